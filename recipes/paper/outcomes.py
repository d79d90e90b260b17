"""What the runs of a study leave for its report: predictions of trained models on test sets."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from bmoe_lightning.report import MethodResult

Mode = Literal["experts", "lora"]
"""What is fine-tuned: the experts, or LoRA's matrices."""
MODES: tuple[Mode, ...] = ("experts", "lora")


@dataclass(frozen=True)
class Outcome:
    """The predictions of models that were trained on one data set, on one test set.

    Attributes:
        trained_on: Name of the data set of the training.
        mode: What was fine-tuned.
        tested_on: Name of the data set whose test questions were answered.
        results: Predictions of every method and seed, on the same questions in the same order.
    """

    trained_on: str
    mode: Mode
    tested_on: str
    results: tuple[MethodResult, ...]


@dataclass(frozen=True)
class Study:
    """All outcomes of a study.

    Attributes:
        preset: Name of the preset.
        model: Model, in words.
        home: Data set on which the models are trained that are tested on the others.
        labels: Display name of each data set, in the order of columns.
        tables: Numbers of the tables that were asked for.
        figures: Numbers of the figures that were asked for.
        outcomes: The predictions.
        versions: Versions of the libraries that the study was finished with; empty if an earlier version made it.
        hashes: Digests of what each run's numbers were made from, by the name of the run; see `run_hashes`.
    """

    preset: str
    model: str
    home: str
    labels: dict[str, str]
    tables: tuple[int, ...]
    figures: tuple[int, ...]
    outcomes: tuple[Outcome, ...]
    versions: Mapping[str, str] = field(default_factory=dict)
    hashes: Mapping[str, Any] = field(default_factory=dict)

    def results(self, trained_on: str, tested_on: str, mode: Mode = "experts") -> tuple[MethodResult, ...]:
        """The predictions of models trained on one data set, on the test questions of another or the same.

        Args:
            trained_on: Data set of the training.
            tested_on: Data set of the test questions.
            mode: What was fine-tuned.

        Raises:
            KeyError: If the study has no such outcome.
        """
        key = (trained_on, tested_on, mode)
        found = [entry.results for entry in self.outcomes if (entry.trained_on, entry.tested_on, entry.mode) == key]
        if not found:
            raise KeyError(f"no models trained on {trained_on} ({mode}) were tested on {tested_on}")
        return tuple(itertools.chain.from_iterable(found))
