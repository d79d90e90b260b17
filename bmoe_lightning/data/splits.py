"""The parts of an experiment, from the splits of a data set by a protocol."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Sequence
from pathlib import Path

from bmoe_lightning.data.duplicates import make_disjoint
from bmoe_lightning.data.hub import is_hub_id, load_questions, task_of_source
from bmoe_lightning.data.protocols.base import Calibration, HeldOutShare, Protocol, Remainder, TrainingSample
from bmoe_lightning.data.protocols.registry import get_protocol
from bmoe_lightning.data.questions import Question, Splits, draw, question_key, split_train
from bmoe_lightning.data.tasks.base import SplitName, Task

_logger = logging.getLogger(__name__)


def load_splits(
    source: str | os.PathLike[str],
    protocol: str | Protocol = "holdout",
    *,
    task: str | Task | None = None,
    revision: str | None = None,
) -> Splits:
    """Load the questions of a data set, each part as a protocol says.

    Args:
        source: Folder or hub id, as in `load_questions`.
        protocol: Registered name, instance or `package.module:Class`.
        task: Task of the rows, as in `load_questions`.
        revision: Revision of a hub data set.

    Returns:
        The parts, without questions that a later part asks too; sizes and origin are logged.

    Warns:
        UserWarning: If questions were left out of train or calibration (see `make_disjoint`), or those that calibrate
            are trained on too.

    Raises:
        ValueError: If the data are malformed, or a calibration part of the protocol is trained on.
        FileNotFoundError: If a split or configuration of the protocol is missing.
        DataUnavailableError: If the data cannot be loaded.
    """
    protocol, source = get_protocol(protocol), str(source)
    found = task_of_source(source, task=task, revision=revision)
    if found is None:
        load_questions(source, "train", task=task, revision=revision)  # raises if there is no such split
        raise ValueError(f"{source} has no questions; its files are empty")
    parts, others = protocol.parts(found), _other_configs(source, found, protocol)

    def read(split: SplitName, source: str = source) -> tuple[Question, ...] | None:
        return load_questions(source, split, task=task, revision=revision)

    def required(split: SplitName, source: str = source) -> tuple[Question, ...]:
        questions = read(split, source)
        if questions is None:
            raise FileNotFoundError(
                f"the protocol {protocol.name} uses the {split} split of {source}, which has none; add it, or choose "
                "another protocol"
            )
        return questions

    train, calibration, held_out = required(parts.train), parts.calibration, None
    if isinstance(calibration, str):
        held_out = required(calibration) if parts.otherwise is None else read(calibration)
        if held_out is None and parts.otherwise is not None:
            calibration = parts.otherwise
    elif isinstance(calibration, Remainder):
        held_out = _remainder(*(required("train", other) for other in others))
    reported = found.split_names(parts.test)[0]
    splits = _divided(train, calibration, held_out, required(parts.test), protocol.seed, reported)
    if splits.calibration_in_train:
        warnings.warn(
            f"the protocol {protocol.name} trains on the {len(splits.calibration)} calibration questions too: the "
            "model is surer of them than of new ones, so temperatures and prior precisions tuned on them are biased; "
            "compare with a protocol that holds them out",
            UserWarning,
            stacklevel=2,
        )
    _logger.info(
        "protocol %s: %d questions of %s to train on, %d to calibrate (%s), %d of %s to report",
        protocol.name,
        len(splits.train),
        found.split_names(parts.train)[0],
        len(splits.calibration),
        calibration if isinstance(calibration, str) else calibration.describe(),
        len(splits.test),
        reported,
    )
    return splits


def _remainder(larger: Sequence[Question], smaller: Sequence[Question]) -> tuple[Question, ...]:
    known = {question_key(question) for question in smaller}
    return tuple(question for question in larger if question_key(question) not in known)


def _divided(
    train: tuple[Question, ...],
    calibration: Calibration,
    held_out: tuple[Question, ...] | None,
    test: tuple[Question, ...],
    seed: int,
    reported: str,
) -> Splits:
    """The disjoint parts; `held_out` are the calibration questions that are not taken from train."""
    if held_out is not None:
        return make_disjoint(Splits(train, held_out, test), reported=reported)
    kept = make_disjoint(Splits(train, (), test), reported=reported).train
    if isinstance(calibration, TrainingSample):
        return Splits(kept, draw(kept, calibration.count, seed=seed), test, calibration_in_train=True)
    assert isinstance(calibration, HeldOutShare)
    return Splits(*split_train(kept, calibration.fraction, seed=seed), test)


def download_splits(
    source: str, protocol: str | Protocol = "holdout", *, task: str | Task | None = None, revision: str | None = None
) -> None:
    """Download what `load_splits` reads from the hub into the local cache.

    Args:
        source: Folder or hub id; nothing is done for a folder.
        protocol: As in `load_splits`.
        task: As in `load_splits`.
        revision: As in `load_splits`.

    Raises:
        DataUnavailableError: If the hub cannot be reached or does not have the data set.
    """
    if not is_hub_id(source):
        return
    protocol = get_protocol(protocol)
    # One split of a configuration downloads all of them.
    load_questions(source, "test", task=task, revision=revision)
    found = task_of_source(source, task=task, revision=revision)
    for other in () if found is None else _other_configs(source, found, protocol):
        load_questions(other, "train", task=task, revision=revision)


def _other_configs(source: str, task: Task, protocol: Protocol) -> tuple[str, ...]:
    """The larger and the smaller configuration of a `Remainder`, as sources; none for other parts."""
    needed = protocol.parts(task).calibration
    if not isinstance(needed, Remainder):
        return ()
    base, _, own = source.rpartition(":")
    if not base and Path(source).name in task.configs:
        base, own = str(Path(source).parent), Path(source).name
    base = base or source
    if own == needed.config:
        raise ValueError(
            f"the protocol {protocol.name} calibrates on {needed.describe()}, and {source} is trained on; choose "
            f"{needed.without} or a smaller one, or another protocol"
        )
    for config in (needed.config, needed.without):
        if not is_hub_id(base) and not (Path(base) / config).is_dir():
            raise FileNotFoundError(
                f"the protocol {protocol.name} calibrates on {needed.describe()}, and there is no folder "
                f"{Path(base) / config}; download that configuration too, or choose another protocol"
            )
    return f"{base}:{needed.config}", f"{base}:{needed.without}"
