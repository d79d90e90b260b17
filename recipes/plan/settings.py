"""Options of a plan; torch and transformers are not imported here."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from recipes.common.cli import UsageError, option


@dataclass(frozen=True)
class PlanSettings:
    """Options of `python -m recipes.plan`."""

    model: str = option(help="config.json, a folder with one, qwen1.5-moe-a2.7b, deepseek-moe-16b or a hub id")
    examples: int = option(4957, "training questions, over which the curvature is taken", least=1)
    calibration_examples: int = option(500, "questions that a prior precision or a temperature is fitted on", least=1)
    tokens: int = option(256, "tokens of a question, without padding", least=1)
    batch_size: int = option(8, "batch size of training, curvature and prediction", least=1)
    classes: int = option(4, "choices of a question", least=2)
    rank: int = option(10, "eigenpairs stored of each Kronecker factor", least=1)
    dtype: Literal["bfloat16", "float32"] = option("bfloat16", "dtype of the weights")
    memory: tuple[float, ...] = option((80.0,), "GiB of the accelerator; several separated by commas: 24,40,80,141")
    experts_per_token: int | None = option(None, "experts for each token, if the configuration lacks it", least=1)
    write: str | None = option(None, "also write the launch lines to the marked place in this markdown file")
    json: str | None = option(None, "also write all numbers to this JSON file")

    def __post_init__(self) -> None:
        if not self.memory or not all(0 < size < math.inf for size in self.memory):
            found = ",".join(f"{size:g}" for size in self.memory)
            raise UsageError(f"--memory must be numbers of GiB above 0, got {found}")
