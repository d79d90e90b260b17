"""Settings of a run; torch and transformers are not imported here, so that `--help` is fast.

Options of methods are fields of the methods; `recipes.qwen_obqa.methods` sets those that `--set` names.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from recipes.common.cli import UsageError, check_bounds, option

Kind = Literal["builtin", "small", "full"]
Prompt = Literal["instruction", "letters", "true_false", "cloze"]
Normalise = Literal["sum", "characters", "bytes"]
Precision = Literal["32-true", "bf16-true", "16-true", "bf16-mixed", "16-mixed", "64-true"]
TrainedPart = Literal["experts", "down_proj", "lora"]
FisherName = Literal["exact", "mc", "empirical"]
SketchName = Literal["auto", "nystrom", "rsvd", "exact"]


@dataclass(frozen=True, kw_only=True)
class _CurvatureCommon:
    fisher: FisherName = option("exact", "labels over which the Fisher is taken")
    sketch: SketchName = option("auto", "low-rank algorithm")


@dataclass(frozen=True, kw_only=True)
class CurvatureSettings(_CurvatureCommon):
    """Curvature of the methods that specify none."""

    rank: int | None = option(
        None, "eigenpairs stored of each Kronecker factor; default: 32 for a small model, 10 with --model", least=0
    )


@dataclass(frozen=True, kw_only=True)
class ResolvedCurvature(_CurvatureCommon):
    """`CurvatureSettings` with its rank resolved."""

    rank: int


@dataclass(frozen=True, kw_only=True)
class _Common:
    """Settings that `Settings.resolved` does not change."""

    model: str | None = option(
        None, "hub id or local folder of a mixture-of-experts causal LM; default: a small built-in one"
    )
    data: str | None = option(
        None,
        "hub id (allenai/openbookqa, allenai/ai2_arc:ARC-Easy) or folder with train.jsonl and test.jsonl (or parquet) "
        "in the hub's columns; default: the built-in generated task, or allenai/openbookqa if --model is given",
    )
    task: str | None = option(None, "task that reads the rows of --data, such as openbookqa; default: by its columns")
    revision: str | None = option(None, "branch, tag or commit of --data on the hub")
    protocol: str | None = option(
        None,
        "what the splits of --data are for, by the protocol of a publication: paper, blob, bayesadapt, or "
        "package.module:Class; default: holdout, in which validation (or a fifth of train) calibrates and test is "
        "reported",
    )
    output_dir: str = option("runs/qwen_obqa", "output folder")
    methods: tuple[str | dict[str, Any], ...] = option(
        ("all",),
        "methods to compare, separated by commas: registered names, package.module:Class, or all (that it can fit "
        "without training routers); a YAML file may also list {class_path: ..., init_args: {...}}",
    )
    set: tuple[str, ...] = option(
        (), "option of a method, as METHOD.OPTION=VALUE or METHOD.curvature.OPTION=VALUE; may be repeated", repeat=True
    )
    seeds: int = option(
        1,
        "number of seeds of pre-training (of the built-in model) and fine-tuning; the table has mean and standard "
        "deviation over them",
        least=1,
    )
    first_seed: int = option(0, "first seed", least=0)
    limit: int | None = option(None, "largest number of questions of each split", least=1)
    limit_train: int | None = option(None, "largest number of training questions, instead of --limit", least=1)
    limit_validation: int | None = option(
        None, "largest number of validation (calibration) questions, instead of --limit", least=1
    )
    limit_test: int | None = option(None, "largest number of test questions, instead of --limit", least=1)
    resume: bool = option(
        False, "resume an interrupted run: finished stages are not repeated (the default with the same settings)"
    )
    overwrite: bool = option(False, "replace an earlier run in the output folder")
    dry_run: bool = option(
        False,
        "checks that everything runs, with meaningless numbers: two epochs of two batches, two calibration batches, at "
        "most eight test questions, ensembles of two, random weights for the small model; with --model, batches of 2 "
        "unless sizes are given",
    )
    quiet: bool = option(False, "no progress bars")
    weight_decay: float = option(0.0, "weight decay of AdamW")
    schedule: Literal["linear", "cosine", "constant"] = option("linear", "learning rate schedule")
    train: TrainedPart = option(
        "experts",
        "weights that are fine-tuned: all of the experts, their second linear layers alone, or LoRA's matrices at "
        "q_proj, v_proj and the head (needs peft)",
    )
    half_precision_updates: Literal["master_weights", "stochastic_rounding", "nearest"] = option(
        "master_weights",
        "how trained weights in bfloat16 or float16 are updated: in a float32 copy, rounded at random (bfloat16, needs "
        "torchao), or rounded to nearest, which loses most updates",
    )
    max_length: int = option(256, "longest prompt in tokens", least=1)
    normalise: Normalise = option(
        "sum",
        "with --prompt cloze, what the log-probability of a choice is divided by: nothing, or the number of characters "
        "or bytes of its text",
    )
    curvature_checkpoint_every: int = option(
        100, "batches between checkpoints of the curvature pass, from which an interrupted pass resumes", least=1
    )
    save_model: str | None = option(
        None,
        "new folder for the fine-tuned model and its tokenizer, which transformers loads; with several seeds it gets a "
        "folder seed-N for each",
    )
    accelerator: Literal["auto", "cpu", "gpu"] = option("auto", "Lightning accelerator")
    strategy: Literal["auto", "sharded"] = option(
        "auto",
        "strategy on several processes under torchrun: auto is DDP (each rank holds the model), sharded is FSDP2",
    )

    @property
    def kind(self) -> Kind:
        """`builtin` (small model, generated task), `small` (small model, real data) or `full` (a given model)."""
        if self.model is not None:
            return "full"
        return "builtin" if self.data is None else "small"


@dataclass(frozen=True, kw_only=True)
class Settings(_Common):
    """Settings of `python -m recipes.qwen_obqa`; `resolved` replaces None by the default of the kind of run."""

    epochs: int | None = option(None, "fine-tuning epochs", least=1)
    batch_size: int | None = option(None, "fine-tuning batch size", least=1)
    eval_batch_size: int | None = option(None, "batch size of curvature and prediction", least=1)
    learning_rate: float | None = option(None, "peak learning rate of AdamW")
    expert_dropout: float | None = option(
        None,
        "dropout probability in the experts (or of LoRA's inputs), in fine-tuning and in methods that predict with "
        "dropout",
    )
    prompt: Prompt | None = option(
        None,
        "prompt format: the answers of instruction and letters are letters, cloze scores the text of each choice; "
        "default: the one that the model was trained on",
    )
    precision: Precision | None = option(None, "Lightning precision")
    zero_shot: bool | None = option(
        None,
        "whether the table has a row for the model before fine-tuning, which takes one more pass over the test split; "
        "default: with --model",
    )
    curvature: CurvatureSettings = option(CurvatureSettings(), "curvature of methods that specify none")

    def resolved(self) -> ResolvedSettings:
        """Replace each None: by the paper's hyper-parameters with `--model`, else by those of the small model.

        Raises:
            UsageError: If a value is out of range.
        """
        check_bounds(self)
        chosen = dict(_DEFAULTS[self.kind])
        if self.dry_run:
            chosen |= _DRY_RUN[self.kind]
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        values |= {name: value for name, value in chosen.items() if values.get(name, self) is None}
        rank = chosen["rank"] if self.curvature.rank is None else self.curvature.rank
        if self.zero_shot is None:
            values["zero_shot"] = self.kind == "full"
        values["curvature"] = ResolvedCurvature(rank=rank, fisher=self.curvature.fisher, sketch=self.curvature.sketch)
        if self.kind == "full" and self.data is None:
            values["data"] = "allenai/openbookqa"
        return ResolvedSettings(**values)


@dataclass(frozen=True, kw_only=True)
class ResolvedSettings(_Common):
    """Settings without defaults left to fill in; made by `Settings.resolved`.

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
    zero_shot: bool
    curvature: ResolvedCurvature

    def __post_init__(self) -> None:
        if self.resume and self.overwrite:
            raise UsageError("--resume and --overwrite exclude each other; give one of the two")
        if self.kind == "builtin" and (self.task or self.revision or self.protocol):
            raise UsageError(
                "--task, --revision and --protocol apply to --data alone, which is not given; add --data, or leave "
                "them out"
            )
        if self.kind == "builtin" and self.prompt == "true_false":
            raise UsageError(
                "--prompt true_false is for questions that True or False answers, such as google/boolq's, and the "
                "built-in task has none; add --data, or choose another prompt"
            )
        if self.normalise != "sum" and self.prompt != "cloze":
            raise UsageError(
                f"--normalise {self.normalise} is for choices that are scored by their text, and the answers of the "
                f"prompt format {self.prompt} are single tokens; add --prompt cloze, or leave it out"
            )
        if self.train == "lora" and self.save_model is not None:
            raise UsageError(
                "--save-model writes a model for transformers, and with --train lora the trained weights are adapters; "
                "leave one of the two out"
            )
        if self.half_precision_updates == "stochastic_rounding" and self.precision == "16-true":
            raise UsageError(
                "--half-precision-updates stochastic_rounding is for bfloat16, and --precision is 16-true; give "
                "bf16-true, or master_weights"
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
        "prompt": "letters",  # the only format that the built-in model was trained on
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


def default_prompt(kind: Kind) -> str:
    """The prompt format of a kind of run, unless one is given.

    Args:
        kind: Kind of the run.
    """
    return str(_DEFAULTS[kind]["prompt"])


_DRY_RUN: Mapping[Kind, dict[str, Any]] = {
    "builtin": {"epochs": 2},  # ensembles of checkpoints have at least two members
    "small": {"epochs": 2},
    "full": {"epochs": 2, "batch_size": 2, "eval_batch_size": 2},
}
