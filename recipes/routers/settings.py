"""Settings of the study of routers; torch and transformers are not imported here, so that `--help` is fast."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from recipes.common.cli import option
from recipes.common.study_settings import StudySettings

PresetName = Literal["small", "granite", "qwen", "deepseek"]


@dataclass(frozen=True, kw_only=True)
class RouterSettings(StudySettings):
    """Settings of `python -m recipes.routers`.

    Raises:
        UsageError: If two flags exclude each other.
    """

    preset: PresetName = option(
        "small",
        "model, data sets and hyper-parameters: small (generated data, CPU), or granite (Granite-3.1-3B-A800M), qwen "
        "(Qwen1.5-MoE-A2.7B) or deepseek (DeepSeek-MoE-16B) on OpenBookQA, ARC, MedMCQA and law questions of MMLU",
    )
    output_dir: str = option("runs/routers", "output folder; runs found there are resumed")
    methods: tuple[str, ...] = option(
        ("all",),
        "methods with random routers, separated by commas: registered names, or all; the controls are always there",
    )
    set: tuple[str, ...] = option((), "option of a method, as METHOD.OPTION=VALUE; may be repeated", repeat=True)
    num_samples: int | None = option(
        None, "number of samples of every random router; default: 8 for the small model, 35 as in the papers", least=1
    )
    stability_questions: int = option(
        50, "number of test questions on which the stability of routes is measured; 50 in the papers", least=1
    )
