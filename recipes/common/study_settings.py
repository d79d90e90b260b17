"""Settings that studies of several runs share; torch and transformers are not imported here."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

from recipes.common.cli import UsageError, option
from recipes.qwen_obqa.settings import Normalise, Precision, Prompt


@dataclass(frozen=True, kw_only=True)
class StudySettings:
    """Settings of a study: models that are trained on data sets, and tested on these and others.

    Raises:
        UsageError: If two flags exclude each other.
    """

    preset: str
    output_dir: str
    report: str | None = option(None, "only make the report of a finished study in this folder again")
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
    seeds: int | None = option(None, "number of seeds; default: that of the preset", least=1)
    first_seed: int = option(0, "first seed", least=0)
    epochs: int | None = option(None, "fine-tuning epochs; default: those of the preset", least=1)
    learning_rate: float | None = option(
        None, "peak learning rate of the models whose experts are trained; default: that of the preset"
    )
    limit: int | None = option(None, "largest number of questions of each split", least=1)
    limit_train: int | None = option(None, "largest number of training questions, instead of --limit", least=1)
    limit_validation: int | None = option(
        None, "largest number of validation (calibration) questions, instead of --limit", least=1
    )
    limit_test: int | None = option(None, "largest number of test questions, instead of --limit", least=1)
    batch_size: int | None = option(None, "fine-tuning batch size", least=1)
    eval_batch_size: int | None = option(None, "batch size of curvature and prediction", least=1)
    accelerator: Literal["auto", "cpu", "gpu"] = option("auto", "Lightning accelerator")
    jobs: int | None = option(
        None,
        "runs at a time, each in a process of its own; default: one a core for the small model on the CPU, otherwise 1",
        least=1,
    )
    overwrite: bool = option(False, "replace the runs in the output folder that are asked for")
    dry_run: bool = option(False, "checks that everything runs, with meaningless numbers")
    quiet: bool = option(False, "no progress bars")

    def __post_init__(self) -> None:
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

    def given(self) -> dict[str, Any]:
        """The hyper-parameters of the main job that are given."""
        names = ("epochs", "learning_rate", "precision", "batch_size", "eval_batch_size")
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    def common(self) -> dict[str, Any]:
        """The options of the main job that are taken as they are."""
        names = (
            "first_seed",
            "normalise",
            "limit",
            "limit_train",
            "limit_validation",
            "limit_test",
            "dry_run",
            "overwrite",
            "quiet",
            "accelerator",
        )
        return {name: getattr(self, name) for name in names}
