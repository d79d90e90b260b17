"""Settings of a run; nothing heavy is imported here, so that `--help` answers at once.

Options of methods are fields of the methods; `recipes.qwen_obqa.methods` sets those that `--set` names.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from recipes.common.cli import UsageError, check_bounds, option

Kind = Literal["builtin", "small", "full"]
Prompt = Literal["instruction", "letters"]
Precision = Literal["32-true", "bf16-true", "16-true", "bf16-mixed", "16-mixed", "64-true"]
FisherName = Literal["exact", "mc", "empirical"]
SketchName = Literal["auto", "nystrom", "rsvd", "exact"]


@dataclass(frozen=True, kw_only=True)
class _CurvatureCommon:
    fisher: FisherName = option("exact", "labels of the Fisher")
    sketch: SketchName = option("auto", "low-rank algorithm")


@dataclass(frozen=True, kw_only=True)
class CurvatureSettings(_CurvatureCommon):
    """Curvature of the methods that name none of their own."""

    rank: int | None = option(
        None, "eigenpairs stored of each Kronecker factor; left out: 32 for a small model, 10 for a given one", least=0
    )


@dataclass(frozen=True, kw_only=True)
class ResolvedCurvature(_CurvatureCommon):
    """`CurvatureSettings` with its rank."""

    rank: int


@dataclass(frozen=True, kw_only=True)
class _Common:
    """What is the same before and after `Settings.resolved`."""

    model: str | None = option(
        None, "hub id or local folder of a mixture-of-experts causal LM; left out: a small one is made"
    )
    data: str | None = option(
        None,
        "hub id (allenai/openbookqa, allenai/ai2_arc:ARC-Easy) or folder with train.jsonl and test.jsonl (or parquet) "
        "in the hub's columns; left out: the built-in generated task, or allenai/openbookqa if --model is given",
    )
    task: str | None = option(None, "how rows of --data are read, such as openbookqa; left out: its columns decide")
    revision: str | None = option(None, "branch, tag or commit of a --data that is a hub id")
    output_dir: str = option("runs/qwen_obqa", "folder of all files that are written")
    methods: tuple[str | dict[str, Any], ...] = option(
        ("all",),
        "methods to compare, separated by commas: registered names, package.module:Class, or all registered ones; a "
        "YAML file may also list {class_path: ..., init_args: {...}}",
    )
    set: tuple[str, ...] = option(
        (), "option of a method, as METHOD.OPTION=VALUE or METHOD.curvature.OPTION=VALUE; may be repeated", repeat=True
    )
    seeds: int = option(
        1,
        "number of seeds of pre-training (the built-in model) and fine-tuning; the table has mean and standard "
        "deviation over them",
        least=1,
    )
    first_seed: int = option(0, "first of these seeds", least=0)
    limit: int | None = option(None, "largest number of questions of each split", least=1)
    resume: bool = option(
        False, "resume an interrupted run: finished stages are not repeated (the default with the same settings)"
    )
    overwrite: bool = option(False, "start again where an earlier run is, and remove its files")
    dry_run: bool = option(
        False,
        "few questions, two epochs, and random weights for the small model: checks that everything runs, within a "
        "minute without --model",
    )
    quiet: bool = option(False, "no progress bars")
    weight_decay: float = option(0.0, "weight decay of AdamW")
    schedule: Literal["linear", "cosine", "constant"] = option("linear", "learning rate schedule")
    train: Literal["experts", "down_proj"] = option(
        "experts", "what is fine-tuned: all weights of the experts, or their second layers alone"
    )
    max_length: int = option(256, "longest prompt in tokens", least=1)
    curvature_checkpoint_every: int = option(
        100, "batches between checkpoints of the curvature pass, from which a killed pass resumes", least=1
    )
    accelerator: Literal["auto", "cpu", "gpu"] = option("auto", "Lightning accelerator")
    strategy: Literal["auto", "sharded"] = option(
        "auto",
        "with several processes, which torchrun starts: auto is DDP (each rank holds the model), sharded is FSDP2",
    )

    @property
    def kind(self) -> Kind:
        """`builtin` (small model, generated task), `small` (small model, real data) or `full` (a given model)."""
        if self.model is not None:
            return "full"
        return "builtin" if self.data is None else "small"


@dataclass(frozen=True, kw_only=True)
class Settings(_Common):
    """What `python -m recipes.qwen_obqa` does; None is replaced according to the kind of run by `resolved`."""

    epochs: int | None = option(None, "fine-tuning epochs", least=1)
    batch_size: int | None = option(None, "fine-tuning batch size", least=1)
    eval_batch_size: int | None = option(None, "batch size of curvature and prediction", least=1)
    learning_rate: float | None = option(None, "peak learning rate of AdamW")
    expert_dropout: float | None = option(
        None, "dropout inside the experts while fine-tuning, and of methods that predict with it"
    )
    prompt: Prompt | None = option(None, "prompt format; left out: the one that the model knows")
    precision: Precision | None = option(None, "Lightning precision")
    curvature: CurvatureSettings = option(CurvatureSettings(), "curvature of methods that name none of their own")

    def resolved(self) -> ResolvedSettings:
        """Replace each None: the paper's hyper-parameters for a given model, gentle ones for the small one.

        Raises:
            UsageError: If a value is out of range.
        """
        check_bounds(self)
        chosen = _DEFAULTS[self.kind]
        if self.dry_run:
            chosen = {**chosen, "epochs": 2}
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        values |= {name: value for name, value in chosen.items() if values.get(name, self) is None}
        rank = chosen["rank"] if self.curvature.rank is None else self.curvature.rank
        values["curvature"] = ResolvedCurvature(rank=rank, fisher=self.curvature.fisher, sketch=self.curvature.sketch)
        if self.kind == "full" and self.data is None:
            values["data"] = "allenai/openbookqa"
        return ResolvedSettings(**values)


@dataclass(frozen=True, kw_only=True)
class ResolvedSettings(_Common):
    """Settings in which nothing is left open; made by `Settings.resolved`.

    Raises:
        UsageError: If a value is out of range, or two exclude each other.
    """

    epochs: int
    batch_size: int
    eval_batch_size: int
    learning_rate: float
    expert_dropout: float
    prompt: Prompt
    precision: Precision
    curvature: ResolvedCurvature

    def __post_init__(self) -> None:
        if self.resume and self.overwrite:
            raise UsageError("--resume continues a run and --overwrite removes it; give one of the two")
        if self.kind == "builtin" and (self.task or self.revision):
            raise UsageError(
                "--task and --revision say how --data is read, and the built-in task has none; give --data"
            )
        if not 0 < self.learning_rate < math.inf:
            raise UsageError(f"--learning-rate must be a number above 0, got {self.learning_rate}")
        if not 0 <= self.weight_decay < math.inf:
            raise UsageError(f"--weight-decay must be a number of at least 0, got {self.weight_decay}")
        if not 0 <= self.expert_dropout < 1:
            raise UsageError(f"--expert-dropout must be at least 0 and below 1, got {self.expert_dropout}")


_DEFAULTS: Mapping[Kind, dict[str, Any]] = {
    "builtin": {
        "epochs": 44,
        "batch_size": 32,
        "eval_batch_size": 64,
        "learning_rate": 6e-4,
        "expert_dropout": 0.2,
        "rank": 32,
        "prompt": "letters",  # the only format that the built-in model has read
        "precision": "32-true",
    },
    "small": {
        "epochs": 3,
        "batch_size": 32,
        "eval_batch_size": 32,
        "learning_rate": 6e-4,
        "expert_dropout": 0.2,
        "rank": 32,
        "prompt": "instruction",
        "precision": "32-true",
    },
    # Table 8 of https://arxiv.org/abs/2511.08968.
    "full": {
        "epochs": 3,
        "batch_size": 8,
        "eval_batch_size": 8,
        "learning_rate": 5e-5,
        "expert_dropout": 0.1,
        "rank": 10,
        "prompt": "instruction",
        "precision": "bf16-true",
    },
}
