"""The measured costs of a study on disk, each with what it was measured on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from bmoe_lightning.utils.file_header import damaged
from bmoe_lightning.utils.json_io import read_json_file, write_json_file
from recipes.paper.outcomes import MODES, Mode
from recipes.paper.report import Cost, Costs, Timing
from recipes.paper.report.section import row_of
from recipes.qwen_obqa.stored_predictions import origin_of_predictions

COSTS_FILE = "costs.json"
_FORMAT = "costs"
_VERSION = 2
_REMEDY = "run the command that made the study again, which measures the costs again"


@dataclass(frozen=True)
class Conditions:
    """Where and on what a cost was measured.

    Attributes:
        host: Name of the machine.
        device: Device, in words.
        seed: Seed of the run.
        train: Number of training questions of the fit.
        calibration: Number of calibration questions of the fit.
        test: Number of test questions that were predicted.
        single: Number of them that were predicted alone.
        batch_size: Batch size of the passes over the training questions.
        eval_batch_size: Batch size of the other passes.
    """

    host: str
    device: str
    seed: int
    train: int
    calibration: int
    test: int
    single: int
    batch_size: int
    eval_batch_size: int

    def on(self, other: Conditions) -> Conditions:
        """The same on the machine and device of others."""
        return replace(self, host=other.host, device=other.device)

    @property
    def sentence(self) -> str:
        """The conditions in words."""
        return (
            f"Each method was measured alone, on {self.device}, with the weights of seed {self.seed}: fits to "
            f"{self.train} training questions in batches of {self.batch_size} and {self.calibration} calibration "
            f"questions in batches of {self.eval_batch_size}, predictions of {self.test} test questions in batches of "
            f"{self.eval_batch_size} and of {self.single} questions alone."
        )


@dataclass(frozen=True)
class StoredCost:
    """The cost of one method.

    Attributes:
        mode: What was fine-tuned.
        method: Name of the method.
        predictions: File of the method's predictions in the study, relative to its folder.
        origin: What these were made with, see `origin_of_predictions`; the cost is of no other run, questions, fit or
            options.
        conditions: Where and on what it was measured.
        cost: The cost.
    """

    mode: Mode
    method: str
    predictions: str
    origin: dict[str, Any]
    conditions: Conditions
    cost: Cost


@dataclass(frozen=True)
class StoredCosts:
    """The costs that a study has.

    Attributes:
        entries: Costs that were measured on what the study has now.
        left_out: Sentences on what was not measured, and why; empty for none.
    """

    entries: tuple[StoredCost, ...] = ()
    left_out: str = ""

    def shown(self) -> Costs:
        """The costs for a report."""
        rows = {row_of(entry.method, entry.mode): entry.cost for entry in self.entries}
        sentences = {row_of(entry.method, entry.mode): entry.conditions.sentence for entry in self.entries}
        return Costs(rows, sentences, self.left_out)


def write_costs(output: Path, entries: Sequence[StoredCost], left_out: str = "") -> None:
    """Write costs atomically.

    Args:
        output: Folder of the study.
        entries: The costs.
        left_out: Sentences on what was not measured.
    """
    content = {"entries": [asdict(entry) for entry in entries], "left_out": left_out}
    write_json_file(output / COSTS_FILE, format=_FORMAT, version=_VERSION, description=content)


def read_costs(output: Path) -> StoredCosts:
    """Read the costs of a study, without those of predictions that it no longer has.

    Args:
        output: Folder of the study.

    Raises:
        ValueError: If the file is damaged, or of another version.
    """
    path = output / COSTS_FILE
    if not path.is_file():
        return StoredCosts()
    content = read_json_file(path, format=_FORMAT, version=_VERSION, remedy=_REMEDY).description
    try:
        entries = [_entry(found) for found in content["entries"]]
        left_out = content["left_out"]
        if not isinstance(left_out, str):
            raise TypeError(f"left_out is {left_out!r}")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise damaged(path, _FORMAT, f"it is incomplete ({error!r})", _REMEDY) from error
    return StoredCosts(tuple(entry for entry in entries if _is_current(output, entry)), left_out)


def reported_costs(output: Path) -> Costs:
    """The costs of a study for its report; of a file that cannot be read, why, since the rest does not need it.

    Args:
        output: Folder of the study.
    """
    try:
        return read_costs(output).shown()
    except ValueError as error:
        return Costs(left_out=str(error))


def _entry(found: dict[str, Any]) -> StoredCost:
    (mode,) = (mode for mode in MODES if mode == found["mode"])
    cost = _cost(found)
    conditions = Conditions(**found["conditions"])
    return StoredCost(mode, str(found["method"]), str(found["predictions"]), dict(found["origin"]), conditions, cost)


def _cost(found: dict[str, Any]) -> Cost:
    stored = dict(found["cost"])
    timings = {
        name: Timing(*map(tuple, (times["seconds"], times["reference"])))
        for name, times in stored.items()
        if isinstance(times, dict)
    }
    cost = Cost(**{**stored, **timings})
    plain = [
        value
        for entry in fields(Cost)
        if entry.name not in timings and (value := getattr(cost, entry.name)) is not None
    ]
    rounds = [(timing.seconds, timing.reference) for timing in timings.values()]
    values = [*plain, *(value for pair in rounds for times in pair for value in times)]
    if not all(isinstance(value, int | float) and math.isfinite(value) and value >= 0 for value in values) or not all(
        own and len(own) == len(reference) and min(reference) > 0 for own, reference in rounds
    ):
        raise ValueError(f"the cost of {found['method']} is {cost}")
    return cost


def _is_current(output: Path, entry: StoredCost) -> bool:
    """Whether the study has the predictions of the run, questions, fit and options that the cost is of."""
    try:
        return origin_of_predictions(output / entry.predictions) == entry.origin
    except FileNotFoundError:
        return False
