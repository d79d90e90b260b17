"""Settings of the paper's experiments; torch and transformers are not imported here, so that `--help` is fast."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from recipes.common.cli import UsageError, option
from recipes.common.study_settings import StudySettings

PresetName = Literal["small", "qwen", "deepseek"]
TABLES = (1, 2, 3, 4, 5, 6, 7)
FIGURES = (1,)


@dataclass(frozen=True, kw_only=True)
class PaperSettings(StudySettings):
    """Settings of `python -m recipes.paper`.

    Raises:
        UsageError: If nothing is asked for, there is no such table or figure, or two flags exclude each other.
    """

    table: tuple[int, ...] = option((), "tables to make, separated by commas: 1 to 7")
    figure: tuple[int, ...] = option((), "figures to make, separated by commas: 1")
    all: bool = option(False, "all tables and figures")
    preset: PresetName = option(
        "small",
        "model, data sets and hyper-parameters: small (generated data, CPU), qwen (Qwen1.5-MoE-A2.7B) or deepseek "
        "(DeepSeek-MoE-16B) on the paper's data sets",
    )
    output_dir: str = option("runs/paper", "output folder; runs found there are resumed")
    lora_learning_rate: float | None = option(
        None, "peak learning rate of the models with LoRA; default: that of the preset"
    )
    zero_shot: bool | None = option(
        None,
        "whether Tables 1 and 2 have a row for the model before fine-tuning; default: unless the small model is used",
    )
    strategy: Literal["auto", "sharded"] = option("auto", "strategy on several processes under torchrun")

    def __post_init__(self) -> None:
        for flag, chosen, known in (("--table", self.table, TABLES), ("--figure", self.figure, FIGURES)):
            if unknown := sorted(set(chosen) - set(known)):
                raise UsageError(f"{flag}: the paper has no {unknown[0]}; there are {', '.join(map(str, known))}")
        asked = self.all or self.table or self.figure
        if self.report is None and not asked:
            raise UsageError("give --table, --figure or --all to say what to make, or --report DIR")
        super().__post_init__()

    @property
    def tables(self) -> tuple[int, ...]:
        """The tables to make, in ascending order."""
        return TABLES if self.all else tuple(sorted(set(self.table)))

    @property
    def figures(self) -> tuple[int, ...]:
        """The figures to make, in ascending order."""
        return FIGURES if self.all else tuple(sorted(set(self.figure)))
