"""Model, data sets and hyper-parameters of the paper's experiments: one entry a preset."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from bmoe_lightning.data.tasks import Task
from recipes.common.cli import UsageError
from recipes.common.study_settings import StudySettings
from recipes.paper.outcomes import Mode


@dataclass(frozen=True)
class DataSet:
    """A data set of a study.

    Attributes:
        name: Name in files and tables.
        label: Display name.
        source: Hub id or folder; None for a generated one of that name.
        protocol: Which questions train, calibrate and are reported; see `bmoe_lightning.data.protocols`.
        prompt: Prompt format; None for that of the run.
        task: Task of the rows, or its name; None recognises it by the columns.
    """

    name: str
    label: str
    source: str | None = None
    protocol: str | None = None
    prompt: str | None = None
    task: str | Task | None = None


@dataclass(frozen=True)
class Preset:
    """A preset.

    Attributes:
        label: Model, in words.
        data: Data sets, in the order of columns; the first is the one whose models are tested on all others.
        model: Folder or hub id of the model; None for the small built-in one.
        seeds: Default number of seeds.
        options: Options of the main job that differ from its defaults.
        lora: Options of the runs that train LoRA's matrices, likewise.
    """

    label: str
    data: tuple[DataSet, ...]
    model: str | None = None
    seeds: int = 3
    options: Mapping[str, Any] = field(default_factory=dict)
    lora: Mapping[str, Any] = field(default_factory=dict)

    def run_options(self, mode: Mode) -> dict[str, Any]:
        """Options of the main job for a run."""
        return {**self.options, **self.lora, "train": "lora"} if mode == "lora" else dict(self.options)


_GENERATED = (
    DataSet("recall", "Recall"),
    DataSet("exceptions", "Exceptions"),
    DataSet("regular", "Regular"),
    DataSet("pairs_small", "Few pairs"),
    DataSet("pairs", "Pairs"),
    DataSet("judged", "Judged"),
)
_PUBLISHED = tuple(
    DataSet(name, label, source, "paper", prompt)
    for name, label, source, prompt in (
        ("openbookqa", "OBQA", "allenai/openbookqa", None),
        ("arc_challenge", "ARC-C", "allenai/ai2_arc:ARC-Challenge", None),
        ("arc_easy", "ARC-E", "allenai/ai2_arc:ARC-Easy", None),
        ("winogrande_s", "WG-S", "allenai/winogrande:winogrande_s", None),
        ("winogrande_m", "WG-M", "allenai/winogrande:winogrande_m", None),
        ("boolq", "BoolQ", "google/boolq", "true_false"),
    )
)

PRESETS: Mapping[str, Preset] = {
    "small": Preset(
        "the small model (4 layers of 8 experts) on generated questions",
        _GENERATED,
        seeds=5,
        # LoRA at rank 8 moves the small model little at the experts' learning rate.
        lora={"learning_rate": 1e-2},
    ),
    "qwen": Preset("Qwen1.5-MoE-A2.7B", _PUBLISHED, "Qwen/Qwen1.5-MoE-A2.7B"),
    "deepseek": Preset("DeepSeek-MoE-16B", _PUBLISHED, "deepseek-ai/deepseek-moe-16b-base"),
}


def chosen_preset(settings: StudySettings, presets: Mapping[str, Preset] = PRESETS) -> Preset:
    """The preset with the model and data sets of the flags.

    Args:
        settings: Settings.
        presets: The study's presets by name.

    Raises:
        UsageError: If a model is given without data sets for it.
    """
    preset = presets[settings.preset]
    data = tuple(_given(entry, preset) for entry in settings.data) or preset.data
    if settings.protocol is not None:
        data = tuple(replace(entry, protocol=settings.protocol) for entry in data)
    if settings.prompt is not None:
        data = tuple(replace(entry, prompt=settings.prompt) for entry in data)
    if settings.model is not None and any(entry.source is None for entry in data):
        raise UsageError(
            f"--model {settings.model} cannot answer the generated questions of the small preset; add --data "
            "NAME=FOLDER_OR_ID, or --preset qwen"
        )
    if not settings.data and settings.model is None:
        return replace(preset, data=data)
    model = settings.model or preset.model
    label = model or "the small model (pre-trained on the training questions alone)"
    if model is not None:
        return Preset(label, data, model)  # the preset's learning rates and seeds may be those of the small model
    return Preset(label, data, model, preset.seeds, {} if settings.data else preset.options, preset.lora)


def _given(entry: str, preset: Preset) -> DataSet:
    """A data set of `--data`: with label, protocol, prompt and task of the published one of that name."""
    name, _, source = entry.partition("=")
    known = {entry.name: entry for entry in (*preset.data, *_PUBLISHED)}.get(name)
    if known is None or known.source is None:
        return DataSet(name, name, source, "paper")
    return replace(known, source=source)
