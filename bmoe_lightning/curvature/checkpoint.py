"""The running sums of a curvature pass on disk, so that a pass that was killed goes on instead of beginning anew.

One safetensors file for each process, replaced whole at every write: all sums, the state of every generator, how far
the pass has come, and a digest of the batches so far, by which it is noticed if they come in another order.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from bmoe_lightning.experts.counted_batch import CountedBatch, plain_batch
from bmoe_lightning.utils.atomic_io import remove_leftovers
from bmoe_lightning.utils.distributed import gather_number, num_processes, process_rank
from bmoe_lightning.utils.safetensors_io import read_safetensors, write_safetensors

FORMAT = "bmoe_lightning.curvature"
VERSION = 1
_GENERATOR = "generator"
_DAMAGED = -1  # in the place of the number of writes
_BEFORE = ".before"  # of several processes, what each wrote the time before


class Stateful(Protocol):
    """Something whose sums go into a checkpoint."""

    def state(self) -> dict[str, Tensor]:
        """All that it needs to go on elsewhere, by name."""
        ...

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a `state`; a ValueError if it does not fit."""
        ...


@dataclass(frozen=True)
class Progress:
    """How far a pass has come.

    Attributes:
        batches: that have been added, of this process.
        examples: in them.
        checked: whether it has been checked thoroughly that the model keeps examples apart.
        writes: how often the checkpoint has been written; all processes write together.
        digest: of the batches; see `extended_digest`.
    """

    batches: int = 0
    examples: int = 0
    checked: bool = False
    writes: int = 0
    digest: str = ""


class PassCheckpoint:
    """Writes the state of a pass now and then, and gives back what a killed one has written.

    The processes of a distributed pass write together: every `every` batches those that have batches left meet, and
    those that have none write what they have once more. So their files stay of the same age, whichever is faster. A
    kill may still come between two of them: each keeps what it wrote the time before, and all go on from what all have.

    Args:
        path: of the file; where the pass is distributed each process has one of its own beside it (see `own_path`).
            None neither reads nor writes.
        every: batches from one write to the next.
        fingerprint: of the model's weights.
        options: all that the sums depend on beside weights and batches, as values that JSON knows.
        distributed: whether all processes of torch.distributed's group take part.

    Raises:
        ValueError: if `every` is below 1, or a file is there that this pass cannot go on with: damaged, of another
            kind or version, of other weights or options; on whichever process.

    Warns:
        UserWarning: if the processes' files have no age in common, as where some were removed; the pass begins anew.
    """

    def __init__(
        self, path: str | Path | None, every: int, fingerprint: str, options: Mapping[str, Any], *, distributed: bool
    ) -> None:
        if every < 1:
            raise ValueError(f"checkpoint_every must be at least 1, got {every}")
        self.progress = Progress()
        self._distributed = distributed
        self._every = every
        self._fingerprint = fingerprint
        self._options = json.loads(json.dumps(options))
        self._tensors: dict[str, Tensor] = {}
        self._path = None if path is None else own_path(path, distributed=distributed)
        if self._path is not None:
            self._read(self._path)
        self._batches, self._digest = self.progress.batches, self.progress.digest
        self.resumed = self.progress.writes > 0

    def remaining(self, batches: Iterable[Any]) -> Iterable[Any]:
        """The batches that have not been added yet.

        Raises:
            ValueError: if the others are not those that were added before the kill, in the same order.
        """
        return batches if self._path is None else self._remaining(iter(batches))

    def restore(self, sums: Sequence[Stateful], generator: torch.Generator) -> None:
        """Put what was read into freshly made sums, and into the generator of drawn labels.

        Raises:
            ValueError: if it does not fit.
        """
        if not self.resumed:
            return
        try:
            generator.set_state(self._tensors.pop(_GENERATOR))
            for position, layer_sums in enumerate(sums):
                start = f"{position}."
                layer_sums.load_state(
                    {name.removeprefix(start): t for name, t in self._tensors.items() if name.startswith(start)}
                )
        except (KeyError, RuntimeError, ValueError) as error:
            raise ValueError(f"{self._path} does not fit this pass ({error}); {_ANEW}") from error
        self._tensors = {}

    def batch_done(self, sums: Sequence[Stateful], generator: torch.Generator, examples: int, *, checked: bool) -> None:
        """Write if enough batches have been added since the last time. A collective of a distributed pass.

        Args:
            sums: of all layers.
            generator: of drawn labels.
            examples: in all batches so far.
            checked: see `Progress`.

        Raises:
            OSError: if the file cannot be written; the one that was written before is still there.
        """
        if self._path is not None and self._batches % self._every == 0:
            self._num_running(1)
            self._write(self._path, sums, generator, examples, checked=checked)

    def pass_done(self, sums: Sequence[Stateful], generator: torch.Generator, examples: int, *, checked: bool) -> None:
        """Write once more, if there was a reason to write before. A collective of a distributed pass.

        Arguments and errors are those of `batch_done`.
        """
        if self._path is None:
            return
        while self._num_running(0):
            self._write(self._path, sums, generator, examples, checked=checked)
        if self.progress.writes and (self._distributed or self._batches > self.progress.batches):
            self._write(self._path, sums, generator, examples, checked=checked)

    def _num_running(self, own: int) -> int:
        """On how many processes the pass is going on. A collective."""
        return sum(gather_number(own)) if self._distributed else own

    def _remaining(self, batches: Iterator[Any]) -> Iterator[Any]:
        digest, expected = "", self.progress.batches
        for done in range(expected):
            try:
                digest = extended_digest(digest, next(batches))
            except StopIteration:
                raise ValueError(
                    f"{self._path} is of a pass over {expected} batches or more, and now there are only {done}: give "
                    f"the same data again, or {_ANEW}"
                ) from None
        if digest != self._digest:
            raise ValueError(
                f"the batches come in another order than in the pass that wrote {self._path}, or are others: give the "
                f"same data in the same order (of a shuffling loader, seed the generator), or {_ANEW}"
            )
        for batch in batches:
            # Before anybody changes the batch in place.
            self._batches, self._digest = self._batches + 1, extended_digest(self._digest, batch)
            yield batch

    def _write(
        self, path: Path, sums: Sequence[Stateful], generator: torch.Generator, examples: int, *, checked: bool
    ) -> None:
        writes = self.progress.writes + 1
        self.progress = Progress(self._batches, examples, checked, writes, self._digest)
        tensors = {f"{p}.{name}": t for p, layer in enumerate(sums) for name, t in layer.state().items()}
        header = {
            "version": VERSION,
            "fingerprint": self._fingerprint,
            "options": self._options,
            "progress": asdict(self.progress),
        }
        if self._distributed and path.is_file():
            path.replace(path.with_name(path.name + _BEFORE))
        write_safetensors(path, {**tensors, _GENERATOR: generator.get_state()}, {FORMAT: json.dumps(header)})

    def _read(self, path: Path) -> None:
        remove_leftovers(path)
        error, before = None, path.with_name(path.name + _BEFORE)
        try:
            if path.is_dir():
                raise ValueError(f"{path} is a folder, and was to be the file for the sums of the curvature pass")
            # Killed between two writes of its own, a process has the older one alone.
            newest = before if self._distributed and not path.is_file() else path
            if newest.is_file():
                self.progress, self._tensors = _read(newest, self._fingerprint, self._options)
        except ValueError as found:
            error = found
        if self._distributed:
            self._agree(before, failed=error is not None)
        if error is not None:
            raise error

    def _agree(self, before: Path, *, failed: bool) -> None:
        """Go on only if all processes do, from the same write."""
        writes = gather_number(_DAMAGED if failed else self.progress.writes)
        if failed or len(set(writes)) == 1:
            return
        if _DAMAGED in writes:
            raise ValueError(
                f"the checkpoint of the curvature pass on process {writes.index(_DAMAGED)} cannot be gone on with; "
                "that process says why"
            )
        if self.progress.writes > min(writes) and before.is_file():
            with suppress(ValueError):  # of another pass, or damaged: then there is no age in common
                self.progress, self._tensors = _read(before, self._fingerprint, self._options)
        found = gather_number(self.progress.writes)
        if len(set(found)) > 1:
            warnings.warn(
                f"the processes' checkpoints of the curvature pass have no age in common (written {writes} times): "
                "files were removed, or copied from elsewhere. The pass begins anew",
                stacklevel=5,
            )
            self.progress, self._tensors = Progress(), {}


def own_path(path: str | Path, *, distributed: bool) -> Path:
    """The file of this process: `path` itself or, of several, such as `sums-rank0of2.safetensors`."""
    path = Path(path)
    if not distributed or num_processes() == 1:
        return path
    return path.with_name(f"{path.stem}-rank{process_rank()}of{num_processes()}{path.suffix}")


def remove_checkpoint(path: str | Path) -> None:
    """Remove the files that passes with this `checkpoint` have written, on however many processes.

    For whoever called `collect_factors`, when what was made of the factors is written. Several processes may call this
    at a time, but none while another one still collects.
    """
    path = Path(path)
    own = re.compile(rf"{re.escape(path.stem)}(-rank\d+of\d+)?{re.escape(path.suffix)}({re.escape(_BEFORE)})?")
    beside = [found for found in path.parent.glob("*") if own.fullmatch(found.name)] if path.parent.is_dir() else []
    for found in beside:
        found.unlink(missing_ok=True)
    for found in {path, *beside}:
        remove_leftovers(found)


def extended_digest(digest: str, batch: Any) -> str:
    """The digest of some batches and one more.

    Of a batch all tensors and arrays count, by dtype, shape and bytes, and all plain strings, bytes, numbers and truth
    values, in nested mappings, lists, tuples, sets and the attributes of objects; anything else is left out. A
    `CountedBatch` of which all examples count is the batch itself.

    Args:
        digest: of the batches before, a hexadecimal SHA-256 digest; empty if there is none.
        batch: the next one.

    Raises:
        ValueError: if nothing in the batch counts, so that it cannot be told from another one.
    """
    running = hashlib.sha256(digest.encode())
    counts_whole = isinstance(batch, CountedBatch) and batch.num_counted == batch.size
    if not _add(running, plain_batch(batch) if counts_whole else batch):
        raise ValueError(
            f"nothing in a batch of the kind {type(batch).__name__} tells it from another one, so a curvature pass over"
            " such cannot be gone on with after a kill: give batches of tensors, or leave out the checkpoint"
        )
    return running.hexdigest()


def _add(running: Any, value: Any) -> bool:
    """Add a value; whether there was something in it that counts."""
    if isinstance(value, (Tensor, np.ndarray, np.generic)):
        return _add_array(running, value)
    if isinstance(value, (str, bytes, int, float, bool)):
        plain = repr(value).encode()
        running.update(f"{type(value).__name__} {len(plain)};".encode() + plain)
        return True
    if isinstance(value, (list, tuple)):
        kind, items = "sequence", list(value)
    elif isinstance(value, (set, frozenset)):
        kind, items = "set", sorted(value, key=repr)
    elif isinstance(value, Mapping):
        kind, items = "mapping", [item for pair in value.items() for item in pair]
    else:
        fields = dataclasses.fields(value) if dataclasses.is_dataclass(value) else ()
        attributes = {field.name: getattr(value, field.name) for field in fields} or getattr(value, "__dict__", {})
        kind, items = "object", [item for pair in attributes.items() for item in pair]
    running.update(f"{kind} {len(items)};".encode())
    counted = [_add(running, item) for item in items]
    return any(counted)


def _add_array(running: Any, value: Tensor | np.ndarray[Any, Any] | np.generic) -> bool:
    if isinstance(value, Tensor):
        if value.layout is not torch.strided or value.is_nested or value.is_quantized:
            return False
        flat = value.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
        data: Any = flat.view(torch.uint8).numpy()
    else:
        if value.dtype.hasobject:
            return _add(running, value.tolist())
        data = np.ascontiguousarray(value).tobytes()
    running.update(f"{value.dtype} {tuple(value.shape)};".encode())
    running.update(data)
    return True


_ANEW = "delete the file, and the pass begins anew"


def _read(path: Path, fingerprint: str, options: Mapping[str, Any]) -> tuple[Progress, dict[str, Tensor]]:
    """What a file holds, if it is one of this pass."""
    try:
        tensors, metadata = read_safetensors(path)
    except ValueError as error:
        raise ValueError(f"{error} It was to be a checkpoint of the curvature pass; {_ANEW}") from error
    if FORMAT not in metadata:
        raise ValueError(
            f"{path} is a safetensors file, but no checkpoint of a curvature pass; give another name, or {_ANEW}"
        )
    try:
        header = json.loads(metadata[FORMAT])
        version = header["version"]
        if version != VERSION:
            raise ValueError(
                f"{path} has version {version} of the format of curvature checkpoints; this release reads version "
                f"{VERSION}: go on with the release that wrote it, or {_ANEW}"
            )
        progress, found = Progress(**header["progress"]), dict(header["options"])
        same_weights = header["fingerprint"] == fingerprint
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} has a header that does not describe a pass ({error!r}); {_ANEW}") from error
    if not same_weights:
        raise ValueError(
            f"{path} is of a curvature pass with other weights than the model has: load those that it was begun with, "
            f"or {_ANEW}"
        )
    differing = sorted(name for name in found.keys() | options.keys() if found.get(name) != options.get(name))
    if differing:
        had = ", ".join(f"{name}={_shown(found.get(name))}" for name in differing)
        wanted = ", ".join(f"{name}={_shown(options.get(name))}" for name in differing)
        raise ValueError(
            f"{path} is of a curvature pass with other settings ({had}, now {wanted}): give the same ones to go on, or "
            f"{_ANEW}"
        )
    return progress, tensors


def _shown(value: Any) -> str:
    """A value in a message; expert layers by their names alone."""
    names = [layer["name"] for layer in value if isinstance(layer, dict)] if isinstance(value, list) else []
    return repr(names or value)
