"""Settings of the study; torch and transformers are not imported here, so that `--help` is fast."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from recipes.common.cli import UsageError, option


@dataclass(frozen=True, kw_only=True)
class StudySettings:
    """Settings of `python -m recipes.calibration_study`.

    Raises:
        UsageError: If there are no split sizes, draws or seeds to measure.
    """

    output_dir: str = option("runs/calibration_study", "output folder; fine-tunings found there are not repeated")
    data: tuple[str, ...] = option(
        (),
        "hub ids or folders of real questions (train.jsonl and test.jsonl), separated by commas, beside the built-in "
        "task",
    )
    methods: tuple[str | dict[str, Any], ...] = option(
        ("all",),
        "methods to compare, separated by commas: registered names, package.module:Class, or all that need a fitted "
        "model and its held-out questions alone; a YAML file may also list {class_path: ..., init_args: {...}}",
    )
    seeds: int = option(5, "number of seeds, each with a pre-training of its own", least=1)
    first_seed: int = option(0, "first seed", least=0)
    split_sizes: tuple[int, ...] = option(
        (32, 64, 128, 256), "sizes of the calibration split, separated by commas, beside the whole of it"
    )
    draws: int = option(1, "calibration splits of each size that are drawn for each fine-tuning", least=1)
    label_draws: int = option(20, "draws of each number of labels for the temperatures", least=1)
    quiet: bool = option(False, "no progress bars")

    def __post_init__(self) -> None:
        if any(size < 1 for size in self.split_sizes):
            raise UsageError(f"--split-sizes must be positive numbers, got {self.split_sizes}")
        if not self.methods:
            raise UsageError("--methods is empty; name at least one method")
