"""Checkpoints of a curvature pass, from which a killed pass resumes.

One safetensors file per rank, replaced atomically at every write: all running sums, the state of every generator, the
progress of the pass, and a digest of the batches so far, which detects another order of them.
"""

from __future__ import annotations

import dataclasses
import json
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from bmoe_lightning.curvature.batch_digest import extended_digest
from bmoe_lightning.curvature.sketch import check_state
from bmoe_lightning.utils.atomic_io import remove_leftovers
from bmoe_lightning.utils.distributed import failing_together, gather_number, num_processes, process_rank
from bmoe_lightning.utils.interruption import InterruptedPassError
from bmoe_lightning.utils.memory import is_out_of_memory
from bmoe_lightning.utils.safetensors_io import (
    read_tensor_file,
    remove_tensor_file,
    write_tensor_file,
)

FORMAT = "curvature checkpoint"
VERSION = 1
_GENERATOR = "generator"
_RECORD, _USED, _SHARE = "data.", "weights.", "share."
_DONE, _RUNNING, _STOPPED = range(3)  # states of a rank, all-gathered before each write
_PREVIOUS = ".before"  # suffix of the previous file of each of several ranks
_RESTART = "delete the file to start the curvature pass from the beginning"


class Stateful(Protocol):
    """An object whose state goes into a checkpoint."""

    def state(self) -> dict[str, Tensor]:
        """All tensors needed to resume, by name."""
        ...

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore a `state`; raises `ValueError` if it does not fit."""
        ...


@dataclass(frozen=True)
class Progress:
    """Progress of a pass.

    Attributes:
        batches: Number of batches that this rank has added.
        examples: Number of examples in them.
        checked: Whether the thorough check that the model does not mix examples is done.
        writes: Number of times that the checkpoint was written; all ranks write together.
        digest: Digest of the batches; see `extended_digest`.
    """

    batches: int = 0
    examples: int = 0
    checked: bool = False
    writes: int = 0
    digest: str = ""


class PassCheckpoint:
    """Writes the state of a pass every few batches, and restores the state of a killed pass.

    The ranks of a distributed pass write in lockstep: every `every` batches the ranks that have batches left
    synchronise, and those that have none write their state again, so the files of all ranks are from the same write. A
    kill may come between the writes of two ranks: each rank retains its previous file, and all resume from the newest
    write that every rank has.

    The state is also written when the iterable of batches raises `KeyboardInterrupt` or `SystemExit`, which it does
    between two batches after a signal; the other ranks then write theirs and stop.

    Args:
        path: Path of the file; in a distributed pass each rank has a separate file beside it (see `rank_path`). None
            neither reads nor writes.
        every: Number of batches between two writes.
        fingerprint: Fingerprint of the model's weights.
        options: Everything else that the sums depend on, except the batches, as JSON values.
        distributed: Whether all ranks of torch.distributed's default group take part.
        record: Record of the data, which is written and restored with the sums.
        used: Record of the weights outside of the fingerprinted module, likewise.
        share: Record of the share of the trained weights' gradient, likewise.

    Raises:
        ValueError: If `every` is below 1, or this rank's file is damaged, has another format or version, or is from a
            pass with other weights or options.
        OSError: If an existing file cannot be read.
        OtherRankError: If another rank cannot resume from its file.

    Warns:
        UserWarning: If the ranks' files have no write in common because some were removed; the pass starts from the
            beginning.
    """

    def __init__(
        self,
        path: str | Path | None,
        every: int,
        fingerprint: str,
        options: Mapping[str, Any],
        *,
        distributed: bool,
        record: Stateful | None = None,
        used: Stateful | None = None,
        share: Stateful | None = None,
    ) -> None:
        if every < 1:
            raise ValueError(f"checkpoint_every must be at least 1, got {every}")
        self.progress = Progress()
        self._distributed = distributed
        self._every = every
        self._records = {_RECORD: record, _USED: used, _SHARE: share}
        self._fingerprint = fingerprint
        self._options = json.loads(json.dumps(options))
        self._tensors: dict[str, Tensor] = {}
        self._path = None if path is None else rank_path(path, distributed=distributed)
        if self._path is not None:
            self._resume(self._path)
        self._batches, self._digest = self.progress.batches, self.progress.digest
        self._latest: Callable[[], None] | None = None  # writes the state after the last batch
        self.resumed = self.progress.writes > 0

    def remaining(self, batches: Iterable[Any]) -> Iterable[Any]:
        """The batches that have not been added yet.

        Raises:
            ValueError: If the first batches differ from those added before the kill, or come in another order.
        """
        return batches if self._path is None else self._remaining(self._written_before_stop(iter(batches)))

    def restore(self, sums: Sequence[Stateful], generator: torch.Generator) -> None:
        """Restore the loaded state in newly created sums, and in the generator of sampled labels.

        Raises:
            ValueError: If it does not fit.
        """
        if not self.resumed:
            return
        try:
            state = self._tensors[_GENERATOR]
            check_state({_GENERATOR: generator.get_state()}, {_GENERATOR: state})
            generator.set_state(state)
            for start, part in self._parts(sums):
                part.load_state(
                    {name.removeprefix(start): t for name, t in self._tensors.items() if name.startswith(start)}
                )
        except (KeyError, RuntimeError, ValueError) as error:
            if is_out_of_memory(error):
                raise
            raise _refusal(self._path, f"does not fit this pass ({error})") from error
        self._tensors = {}

    def batch_done(self, sums: Sequence[Stateful], generator: torch.Generator, examples: int, *, checked: bool) -> None:
        """Write if enough batches were added since the last write. A collective in a distributed pass.

        Args:
            sums: Running sums of all layers.
            generator: Generator of sampled labels.
            examples: Number of examples in all batches so far.
            checked: Whether the thorough check is done; see `Progress`.

        Raises:
            OSError: If the file cannot be written; the previous one is unchanged.
            OtherRankError: If another rank has failed.
            InterruptedPassError: If another rank was stopped by a signal.
        """
        if self._path is None:
            return
        self._latest = partial(self._write, self._path, sums, generator, examples, checked=checked)
        if self._batches % self._every == 0:
            states = self._states(_RUNNING)
            self._latest()
            if _STOPPED in states:
                raise InterruptedPassError

    def pass_done(self, sums: Sequence[Stateful], generator: torch.Generator, examples: int, *, checked: bool) -> None:
        """Write a last time if the pass has written before. A collective in a distributed pass.

        Arguments and errors are as in `batch_done`.
        """
        if self._path is None:
            return
        while any(states := self._states(_DONE)):
            self._write(self._path, sums, generator, examples, checked=checked)
            if _STOPPED in states:
                raise InterruptedPassError
        if self.progress.writes and (self._distributed or self._batches > self.progress.batches):
            self._write(self._path, sums, generator, examples, checked=checked)

    def _parts(self, sums: Sequence[Stateful]) -> list[tuple[str, Stateful]]:
        """Everything with a state, and what the names of its tensors begin with."""
        parts = [(f"{position}.", layer) for position, layer in enumerate(sums)]
        return parts + [(start, record) for start, record in self._records.items() if record is not None]

    def _states(self, state: int) -> list[int]:
        """The states of all ranks. A collective in a distributed pass."""
        return gather_number(state) if self._distributed else [state]

    def _remaining(self, batches: Iterator[Any]) -> Iterator[Any]:
        digest, expected = "", self.progress.batches
        for done in range(expected):
            try:
                digest = extended_digest(digest, next(batches))
            except StopIteration:
                raise _refusal(
                    self._path, f"is from a pass over at least {expected} batches, and now there are only {done}",
                    "Pass the same data again",
                ) from None  # fmt: skip
        if digest != self._digest:
            raise _refusal(
                self._path, "is from a pass whose batches came in another order or had other contents",
                "Pass the same data in the same order (seed the generator of a loader that shuffles)",
            )  # fmt: skip
        for batch in batches:
            # Before the model may modify the batch in place.
            self._batches, self._digest = self._batches + 1, extended_digest(self._digest, batch)
            yield batch

    def _written_before_stop(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The batches; if a signal stops the iterator, the state is written first."""
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                return
            except (KeyboardInterrupt, SystemExit):
                self._states(_STOPPED)
                if self._latest is not None and (self._distributed or self._batches > self.progress.batches):
                    self._latest()
                raise
            yield batch

    def _write(
        self, path: Path, sums: Sequence[Stateful], generator: torch.Generator, examples: int, *, checked: bool
    ) -> None:
        writes = self.progress.writes + 1
        self.progress = Progress(self._batches, examples, checked, writes, self._digest)
        tensors = {f"{start}{name}": t for start, part in self._parts(sums) for name, t in part.state().items()}
        tensors[_GENERATOR] = generator.get_state()
        description = {
            "fingerprint": self._fingerprint,
            "options": self._options,
            "progress": asdict(self.progress),
        }
        if self._distributed and path.is_file():
            path.replace(_previous(path))
        write_tensor_file(path, tensors, format=FORMAT, version=VERSION, description=description)

    def _resume(self, path: Path) -> None:
        remove_leftovers(path)
        with failing_together(distributed=self._distributed):
            # A rank that was killed between rename and write has only the previous file.
            newest = _previous(path) if self._distributed and not path.exists() else path
            if newest.exists():
                self.progress, self._tensors = read_checkpoint(newest, self._fingerprint, self._options)
        if self._distributed:
            self._agree(_previous(path))

    def _agree(self, previous: Path) -> None:
        """Agree on the newest write that all ranks have. A collective."""
        writes = gather_number(self.progress.writes)
        if len(set(writes)) == 1:
            return
        if self.progress.writes > min(writes) and previous.is_file():
            with suppress(OSError, ValueError):  # of another pass, or damaged: no common write
                self.progress, self._tensors = read_checkpoint(previous, self._fingerprint, self._options)
        found = gather_number(self.progress.writes)
        if len(set(found)) > 1:
            warnings.warn(
                f"the ranks' curvature checkpoints have no write in common (written {writes} times), as if files were "
                "removed or copied from elsewhere; the curvature pass starts from the beginning",
                stacklevel=5,
            )
            self.progress, self._tensors = Progress(), {}


def rank_path(path: str | Path, *, distributed: bool) -> Path:
    """The file of this rank: `path` itself or, with several ranks, for example `sums-rank0of2.safetensors`."""
    path = Path(path)
    if not distributed or num_processes() == 1:
        return path
    return path.with_name(f"{path.stem}-rank{process_rank()}of{num_processes()}{path.suffix}")


def remove_checkpoint(path: str | Path) -> None:
    """Remove the files that passes with this `checkpoint` wrote, for any number of ranks.

    Call it after `collect_factors`, once the factors or their results are saved. Several ranks may call it at the same
    time, but not while a pass still runs on another rank. Files that are not curvature checkpoints are not removed.

    Args:
        path: The `checkpoint` of the passes.
    """
    path = Path(path)
    name = re.compile(rf"{re.escape(path.stem)}(-rank\d+of\d+)?{re.escape(path.suffix)}({re.escape(_PREVIOUS)})?")
    if not path.parent.is_dir():
        return
    for found in {path, *(found for found in path.parent.iterdir() if name.fullmatch(found.name))}:
        remove_tensor_file(found, format=FORMAT)
    # A rank that was killed during its first write has left a temporary file alone.
    for leftover in path.parent.glob(".*.tmp"):
        target = leftover.name[1:].rsplit(".", 2)[0]
        if name.fullmatch(target):
            remove_leftovers(path.with_name(target))


def read_checkpoint(path: Path, fingerprint: str, options: Mapping[str, Any]) -> tuple[Progress, dict[str, Tensor]]:
    """Read progress and tensors of a file from which a pass can resume.

    Args:
        path: Path of the file.
        fingerprint: Fingerprint of the weights of this pass; see `PassCheckpoint`.
        options: Options of this pass, as JSON values.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it is not a curvature checkpoint, is damaged, has another version, or is from a pass with other
            weights or options.
    """
    file = read_tensor_file(path, format=FORMAT, version=VERSION, remedy=_RESTART)
    try:
        known = {field.name: file.description["progress"][field.name] for field in dataclasses.fields(Progress)}
        progress, found = _checked(Progress(**known)), dict(file.description["options"])
        same_weights = file.description["fingerprint"] == fingerprint
    except (KeyError, TypeError, ValueError) as error:
        raise _refusal(path, f"has a header that does not describe a pass ({error!r})") from error
    if not same_weights:
        raise _refusal(
            path, "is from a curvature pass with other weights than the model has", "Load the weights of that pass"
        )
    differing = sorted(name for name in found.keys() | options.keys() if found.get(name) != options.get(name))
    if differing:
        before = ", ".join(f"{name}={_shown(found.get(name))}" for name in differing)
        now = ", ".join(f"{name}={_shown(options.get(name))}" for name in differing)
        raise _refusal(
            path, f"is from a curvature pass with other settings ({before}, now {now})", "Resume with the same settings"
        )
    return progress, file.tensors


def _checked(progress: Progress) -> Progress:
    counts = (progress.batches, progress.examples, progress.writes)
    texts = isinstance(progress.digest, str) and isinstance(progress.checked, bool)
    if not texts or not all(type(count) is int and count >= 0 for count in counts) or progress.writes < 1:
        raise ValueError(f"{progress}")
    return progress


def _refusal(path: Path | None, reason: str, action: str = "") -> ValueError:
    remedy = f"{action}, or {_RESTART}" if action else _RESTART[0].upper() + _RESTART[1:]
    return ValueError(f"{path} {reason}. {remedy}.")


def _previous(path: Path) -> Path:
    return path.with_name(path.name + _PREVIOUS)


def _shown(value: Any) -> str:
    """A value in a message; expert layers by their names only."""
    names = [layer.get("name") for layer in value if isinstance(layer, dict)] if isinstance(value, list) else []
    return repr(names or value)
