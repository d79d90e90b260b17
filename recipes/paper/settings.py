"""Settings of the paper's experiments; torch and transformers are not imported here, so that `--help` is fast."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from recipes.common.cli import UsageError, option
from recipes.qwen_obqa.settings import Normalise, Precision, Prompt

PresetName = Literal["small", "qwen", "deepseek"]
TABLES = (1, 2, 3, 4, 5, 6, 7)
FIGURES = (1,)


@dataclass(frozen=True, kw_only=True)
class PaperSettings:
    """Settings of `python -m recipes.paper`.

    Raises:
        UsageError: If nothing is asked for, there is no such table or figure, or two flags exclude each other.
    """

    table: tuple[int, ...] = option((), "tables to make, separated by commas: 1 to 7")
    figure: tuple[int, ...] = option((), "figures to make: 1")
    all: bool = option(False, "all tables and figures")
    preset: PresetName = option(
        "small",
        "model, data sets and hyper-parameters: small (generated data, CPU), qwen (Qwen1.5-MoE-A2.7B) or deepseek "
        "(DeepSeek-MoE-16B) on the paper's data sets",
    )
    model: str | None = option(None, "hub id or local folder of another mixture-of-experts causal LM")
    data: tuple[str, ...] = option(
        (),
        "data sets as NAME=FOLDER_OR_ID, separated by commas, in place of the preset's; the first one is that of the "
        "tables under distribution shift",
    )
    protocol: str | None = option(
        None,
        "what the splits of the data sets are for, in place of the paper's protocol, such as holdout (validation "
        "calibrates, test is reported)",
    )
    prompt: Prompt | None = option(
        None,
        "prompt format of all data sets, in place of their own: the answers of instruction and letters are letters, "
        "cloze scores the text of each choice",
    )
    normalise: Normalise = option(
        "sum",
        "with --prompt cloze, what the log-probability of a choice is divided by: nothing, or the number of characters "
        "or bytes of its text",
    )
    precision: Precision | None = option(None, "Lightning precision; default: that of the preset")
    output_dir: str = option("runs/paper", "output folder; runs found there are resumed")
    report: str | None = option(None, "only make the report of a finished study in this folder again")
    seeds: int | None = option(None, "number of seeds; default: 5 for the small model, 3 otherwise", least=1)
    first_seed: int = option(0, "first seed", least=0)
    epochs: int | None = option(None, "fine-tuning epochs; default: those of the preset", least=1)
    learning_rate: float | None = option(
        None, "peak learning rate of the models whose experts are trained; default: that of the preset"
    )
    lora_learning_rate: float | None = option(
        None, "peak learning rate of the models with LoRA; default: that of the preset"
    )
    limit: int | None = option(None, "largest number of questions of each split", least=1)
    limit_train: int | None = option(None, "largest number of training questions, instead of --limit", least=1)
    limit_validation: int | None = option(
        None, "largest number of validation (calibration) questions, instead of --limit", least=1
    )
    limit_test: int | None = option(None, "largest number of test questions, instead of --limit", least=1)
    batch_size: int | None = option(None, "fine-tuning batch size", least=1)
    eval_batch_size: int | None = option(None, "batch size of curvature and prediction", least=1)
    zero_shot: bool | None = option(
        None,
        "whether Tables 1 and 2 have a row for the model before fine-tuning; default: unless the small model is used",
    )
    accelerator: Literal["auto", "cpu", "gpu"] = option("auto", "Lightning accelerator")
    strategy: Literal["auto", "sharded"] = option("auto", "strategy on several processes under torchrun")
    jobs: int | None = option(
        None,
        "runs at a time, each in a process of its own; default: one a core for the small model on the CPU, otherwise 1",
        least=1,
    )
    overwrite: bool = option(False, "replace the runs in the output folder that are asked for")
    dry_run: bool = option(False, "checks that everything runs, with meaningless numbers")
    quiet: bool = option(False, "no progress bars")

    def __post_init__(self) -> None:
        for flag, chosen, known in (("--table", self.table, TABLES), ("--figure", self.figure, FIGURES)):
            if unknown := sorted(set(chosen) - set(known)):
                raise UsageError(f"{flag}: the paper has no {unknown[0]}; there are {', '.join(map(str, known))}")
        asked = self.all or self.table or self.figure
        if self.report is None and not asked:
            raise UsageError("give --table, --figure or --all to say what to make, or --report DIR")
        self._check_report()
        if self.normalise != "sum" and self.prompt != "cloze":
            raise UsageError(
                f"--normalise {self.normalise} is for choices that are scored by their text; add --prompt cloze, or "
                "leave it out"
            )
        for flag, value in (("--protocol", self.protocol), ("--prompt", self.prompt)):
            if value is not None and self.preset == "small" and not self.data:
                raise UsageError(
                    f"{flag} applies to --data or another --preset; the generated data sets have their own"
                )
        names = [entry.partition("=")[0] for entry in self.data]
        for entry, name in zip(self.data, names, strict=True):
            if "=" not in entry or not name.isidentifier() or not entry.partition("=")[2]:
                raise UsageError(f"--data must be NAME=FOLDER_OR_ID, got {entry!r}; names are letters, digits and _")
        if len(set(names)) < len(names):
            raise UsageError(f"--data has a name twice: {', '.join(names)}; give each data set another name")

    def _check_report(self) -> None:
        others = [entry for entry in fields(self) if entry.name != "report"]
        given = [entry.name for entry in others if getattr(self, entry.name) != entry.default]
        if self.report is not None and given:
            raise UsageError(
                "--report makes the report of a finished study again, with the settings that the study has; leave "
                f"{', '.join('--' + name.replace('_', '-') for name in given)} out"
            )

    @property
    def tables(self) -> tuple[int, ...]:
        """The tables to make, in ascending order."""
        return TABLES if self.all else tuple(sorted(set(self.table)))

    @property
    def figures(self) -> tuple[int, ...]:
        """The figures to make, in ascending order."""
        return FIGURES if self.all else tuple(sorted(set(self.figure)))
