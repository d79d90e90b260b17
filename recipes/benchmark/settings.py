"""Options of the benchmark; torch and transformers are not imported here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from recipes.common.cli import option

SectionName = Literal["curvature", "prediction", "lpo", "routers", "head", "growth", "peers", "serving"]
ShapeName = Literal["default", "qwen1.5-moe", "tiny"]
SECTIONS: tuple[SectionName, ...] = tuple(name for name in get_args(SectionName) if name != "serving")
"""Sections that run by default: all but that which fits every method."""


@dataclass(frozen=True)
class BenchmarkSettings:
    """Options of `python -m recipes.benchmark`."""

    device: Literal["cpu", "cuda"] = option("cpu", "device that runs the model")
    model_shape: ShapeName = option("default", "sizes of model and batch")
    threads: int | None = option(None, "CPU threads; default: torch's", least=1)
    repeats: int = option(4, "rounds that each median is taken over", least=1)
    only: tuple[SectionName, ...] = option(
        SECTIONS, "sections to run, separated by commas; serving, which fits every method first, runs if it is named"
    )
    json: str | None = option(None, "also write every single timing to this JSON file")
    write: str | None = option(None, "also write the table of serving to this markdown file: docs/serving.md")
