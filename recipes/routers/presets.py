"""Models and data sets of the study: one entry a preset."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from bmoe_lightning.data.tasks.medmcqa import MedMCQA
from recipes.paper.presets import DataSet, Preset
from recipes.routers.settings import RouterSettings

_GENERATED = (
    DataSet("recall", "Recall"),
    DataSet("exceptions", "Exceptions"),
    DataSet("pairs", "Pairs"),
    DataSet("judged", "Judged"),
)
_PUBLISHED = (
    DataSet("openbookqa", "OBQA", "allenai/openbookqa", "holdout"),
    DataSet("arc_easy", "ARC-E", "allenai/ai2_arc:ARC-Easy", "holdout"),
    DataSet("arc_challenge", "ARC-C", "allenai/ai2_arc:ARC-Challenge", "holdout"),
    DataSet("medmcqa", "MedMCQA", "openlifescienceai/medmcqa", "holdout", task=MedMCQA(subjects=("Medicine",))),
    DataSet("law", "Law", "cais/mmlu:professional_law", "recipes.routers.evaluated_only:EvaluatedOnly"),
)

PRESETS: Mapping[str, Preset] = {
    "small": Preset("the small model (4 layers of 8 experts) on generated questions", _GENERATED, seeds=3),
    "granite": Preset("Granite-3.1-3B-A800M-instruct", _PUBLISHED, "ibm-granite/granite-3.1-3b-a800m-instruct"),
    "qwen": Preset("Qwen1.5-MoE-A2.7B", _PUBLISHED, "Qwen/Qwen1.5-MoE-A2.7B"),
    "deepseek": Preset("DeepSeek-MoE-16B", _PUBLISHED, "deepseek-ai/deepseek-moe-16b-base"),
}
"""The first data set of each is that of the training."""

_SMALL, _OTHERS = "small", "granite"
_SMALL_SAMPLES, _SAMPLES = 8, 35


def with_preset(settings: RouterSettings) -> RouterSettings:
    """The settings with the preset of a model that is given alone: its own, or the data sets of the papers.

    Args:
        settings: Settings.
    """
    if settings.model is None or settings.data or settings.preset != _SMALL:
        return settings
    own = next((name for name, preset in PRESETS.items() if preset.model == settings.model), None)
    changed: dict[str, Any] = {"preset": _OTHERS} if own is None else {"preset": own, "model": None}
    return replace(settings, **changed)


def default_samples(preset: Preset) -> int:
    """The number of samples of a random router.

    Args:
        preset: Preset, with the model of the flags.
    """
    return _SMALL_SAMPLES if preset.model is None else _SAMPLES
