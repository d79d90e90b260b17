"""The numbers of a plan, as text and as JSON."""

from __future__ import annotations

import itertools
import json
from dataclasses import asdict, dataclass
from typing import Any

import torch

from bmoe_lightning.optim import HalfPrecisionUpdates
from recipes.plan import compute, memory
from recipes.plan.activations import Precision
from recipes.plan.architecture import Architecture, build, describe, load_configuration
from recipes.plan.compute import Workload
from recipes.plan.launch import Launch, launches
from recipes.plan.memory import Training
from recipes.plan.routers import RouterPlan, router_plans, routers_text
from recipes.plan.settings import PlanSettings
from recipes.plan.tables import billions, count, gib, mib, percent, table

PLACE = "launch lines"
_TRAINED_NAMES = {"down_proj": "down_proj only", "experts": "all experts"}
# How weights in half precision are trained without losing updates; those of another dtype need none of it.
_HALF_PRECISION: tuple[HalfPrecisionUpdates, ...] = ("master_weights", "stochastic_rounding")
_UPDATE_NAMES = {"master_weights": " + float32 copy", "stochastic_rounding": ", stochastic rounding", "nearest": ""}


@dataclass(frozen=True)
class Plan:
    """All numbers of a plan.

    Attributes:
        settings: Settings of the command line.
        model: Sizes of the model.
        sizes: Bytes by name.
        operations: Floating-point operations of a batch by name of the pass.
        trainings: Memory of each way of training.
        launches: Ways of launching `recipes.qwen_obqa`.
        routers: What each method with random routers adds.
    """

    settings: PlanSettings
    model: Architecture
    sizes: dict[str, int]
    operations: dict[str, float]
    trainings: tuple[Training, ...]
    launches: tuple[Launch, ...]
    routers: tuple[RouterPlan, ...]


def make_plan(settings: PlanSettings) -> Plan:
    """Build the model on the meta device and compute the numbers.

    Raises:
        ModelUnavailableError: If the configuration cannot be loaded, or no model can be built from it.
        ValueError: If the model has no experts, or rank or number of tokens exceed its sizes.
    """
    config = load_configuration(settings.model)
    dtype: torch.dtype = getattr(torch, settings.dtype)
    model = describe(build(config, dtype), settings.experts_per_token)
    _check_fit(settings, model, config)
    work = Workload(settings.batch_size, settings.tokens, settings.classes, settings.rank)
    precision = Precision(*[dtype.itemsize] * 3)
    sizes = {
        "factors": memory.factor_bytes(model, settings.rank),
        "factors_bfloat16": memory.factor_bytes(model, settings.rank, torch.bfloat16),
        "posterior_file": memory.posterior_file_bytes(model, settings.rank),
        "sketches": memory.sketch_bytes(model, settings.rank),
        "curvature_transients": memory.curvature_transients(model, work, precision),
        "curvature_recomputed": memory.curvature_transients(model, work, precision, checkpointing=True),
        "prediction_transients": memory.prediction_transients(model, work, precision),
        "prediction_recomputed": memory.prediction_transients(model, work, precision, checkpointing=True, offload=True),
        "prior_mean": memory.prior_mean_bytes(model),
        "mapped_pages": memory.mapped_bytes(model),
        "lpo_cache": memory.lpo_cache_bytes(model, work, settings.calibration_examples),
    }
    operations = {
        "forward": compute.forward(model, work),
        "training_down_proj": compute.training_step(model, work, "down_proj"),
        "training_experts": compute.training_step(model, work, "experts"),
        **{f"curvature_{kind}": compute.curvature_batch(model, work, kind) for kind in ("mc", "empirical", "exact")},
        "prediction": compute.prediction(model, work),
    }
    updates = _HALF_PRECISION if dtype.itemsize == 2 else ("nearest",)
    trainings = tuple(
        memory.training_memory(model, work, part, dtype, checkpointing=checkpointing, updates=way)
        for part, way, checkpointing in itertools.product(_TRAINED_NAMES, updates, (False, True))
    )
    plain = sorted((t for t in trainings if not t.checkpointing), key=lambda t: t.trained != "experts")
    ways = launches(model, settings.model, plain, settings.memory)
    return Plan(settings, model, sizes, operations, trainings, ways, router_plans(model, work))


def _check_fit(settings: PlanSettings, model: Architecture, config: Any) -> None:
    for experts in model.experts:
        layer = experts.layer
        if settings.rank > min(layer.d_in, layer.d_out):
            raise ValueError(
                f"--rank {settings.rank} is more than the experts {layer.name!r} are wide (d_in {layer.d_in}, d_out "
                f"{layer.d_out}); give at most {min(layer.d_in, layer.d_out)}"
            )
        if experts.top_k > layer.num_experts:
            raise ValueError(f"--experts-per-token {experts.top_k} is more than the {layer.num_experts} experts")
    longest = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    if longest is not None and settings.tokens > longest:
        raise ValueError(f"--tokens {settings.tokens} is more than the {longest} positions of the model")


def plan_json(plan: Plan) -> str:
    """All numbers as JSON: bytes, operations of one batch, parameters."""
    model = plan.model
    content = {
        "settings": asdict(plan.settings),
        "model": {
            "class": model.name,
            "model_type": model.model_type,
            "parameters": model.parameters,
            "parameters_routed": model.routed,
            "parameters_second": model.second,
            "parameters_active": model.active,
            "weight_bytes": model.weight_bytes,
            "expert_layers": [
                {**asdict(experts.layer), "experts_per_token": experts.top_k} for experts in model.experts
            ],
        },
        "bytes": plan.sizes,
        "operations": plan.operations,
        "routers": [{**asdict(of_method), "forwards": of_method.forwards} for of_method in plan.routers],
        "training": [
            {
                **asdict(training),
                "peak": training.peak,
                "snapshot": training.gradients,
                "member": training.gradients,
                "sample": memory.sample_bytes(model, training.trained, memory.SNAPSHOTS),
                "checkpoint": training.gradients + training.optimizer,
                "optimizer_traffic": training.traffic,
                "fits": {f"{size:g}": training.fits(size) for size in plan.settings.memory},
            }
            for training in plan.trainings
        ],
        "launch": [
            {
                **asdict(launch),
                "peak": launch.training.peak,
                "fits": {f"{size:g}": launch.training.fits(size) for size in plan.settings.memory},
            }
            for launch in plan.launches
        ],
    }
    return json.dumps(content, indent=2) + "\n"


def plan_text(plan: Plan) -> str:
    """The plan as tables for a terminal."""
    texts = [_model_part(plan), _posterior_part(plan), _operations_part(plan), routers_text(plan.routers)]
    texts += [_training_part(plan), launch_text(plan)]
    return "\n\n".join(filter(None, texts))


def _model_part(plan: Plan) -> str:
    model = plan.model
    kinds: dict[tuple[Any, ...], int] = {}
    for experts in model.experts:
        layer = experts.layer
        key = (layer.num_experts, experts.top_k, layer.d_in, layer.d_out, layer.layout)
        kinds[key] = kinds.get(key, 0) + 1
    layers = [[str(count), *map(str, key)] for key, count in kinds.items()]
    share = [
        ["total", billions(model.parameters), ""],
        ["routed experts", billions(model.routed), percent(model.routed, model.parameters)],
        ["second layers (down_proj)", billions(model.second), percent(model.second, model.parameters)],
        ["active for a token", billions(model.active), percent(model.active, model.parameters)],
    ]
    return "\n".join(
        [
            f"{plan.settings.model}: {model.name} ({model.model_type}), {len(model.blocks)} layers, width "
            f"{model.hidden}, vocabulary {model.vocabulary}",
            "",
            *table(["expert layers", "experts", "a token", "d_in", "d_out", "layout"], layers),
            "",
            *table(["parameters", "billion", "share"], share),
        ]
    )


def _posterior_part(plan: Plan) -> str:
    sizes, settings = plan.sizes, plan.settings
    rows = [
        ["factors, rank " + str(settings.rank), mib(sizes["factors"])],
        ["factors, in bfloat16", mib(sizes["factors_bfloat16"])],
        ["posterior file", mib(sizes["posterior_file"])],
        ["sums of the curvature pass, of which the factors are made", mib(sizes["sketches"])],
        ["curvature pass, with these sums, beyond the weights ~", mib(sizes["curvature_transients"])],
        ["    with gradient checkpointing ~", mib(sizes["curvature_recomputed"])],
        ["prediction, with the factors, beyond the weights ~", mib(sizes["prediction_transients"])],
        ["    with gradient checkpointing and offloaded factors ~", mib(sizes["prediction_recomputed"])],
        ["prior mean: the second layers from before fine-tuning, in main memory", mib(sizes["prior_mean"])],
        [f"LPO's cache of {settings.calibration_examples} examples, in main memory", mib(sizes["lpo_cache"])],
    ]
    return "\n".join(
        [
            *table(["posterior", "MiB"], rows),
            f"~ estimated: batches of {settings.batch_size} x {settings.tokens} tokens, {settings.classes} classes.",
        ]
    )


def _operations_part(plan: Plan) -> str:
    settings, operations = plan.settings, plan.operations
    one = operations["forward"]
    passes = settings.classes - 1
    names = {
        "forward": "forward",
        "training_down_proj": "training step, down_proj only",
        "training_experts": "training step, all experts",
        "curvature_mc": "curvature, mc (1 backward pass)",
        "curvature_empirical": "curvature, empirical (1 backward pass)",
        "curvature_exact": f"curvature, exact ({count(passes, 'backward pass', 'backward passes')})",
        "prediction": f"prediction ({count(passes, 'backward pass', 'backward passes')})",
    }
    batches = settings.examples / settings.batch_size
    rows = [
        [
            text,
            f"{operations[name] / 1e12:.3g}",
            f"{operations[name] / one:.2f}",
            f"{operations[name] * batches / 1e15:.3g}",
        ]
        for name, text in names.items()
    ]
    header = ["operations", "TFLOP a batch", "x forward", f"PFLOP for {settings.examples} examples"]
    return "\n".join(
        [
            *table(header, rows),
            "Gradient checkpointing adds up to one forward to a training step. LPO is one prediction pass over its "
            f"{settings.calibration_examples} examples.",
            "AdamW's step is bound by memory instead; what it reads and writes is in the last table before the launch "
            "lines.",
        ]
    )


def _training_part(plan: Plan) -> str:
    sizes = [f"{size:g} GiB" for size in plan.settings.memory]
    rows = []
    for training in plan.trainings:
        parts = (training.weights, training.gradients + training.optimizer, training.activations, training.step)
        rows.append(
            [
                _TRAINED_NAMES[training.trained],
                training.trained_dtype + _UPDATE_NAMES[training.updates],
                "yes" if training.checkpointing else "no",
                *(gib(part) for part in (*parts, training.curvature, training.peak)),
                *("yes" if training.fits(size) else "no" for size in plan.settings.memory),
            ]
        )
    header = [
        "trained",
        "as",
        "recompute",
        "weights",
        "grad+AdamW",
        "activations ~",
        "step",
        "curvature ~",
        "peak ~",
        *sizes,
    ]
    saved = [
        [_TRAINED_NAMES[t.trained], t.trained_dtype + _UPDATE_NAMES[t.updates], gib(t.gradients),
         gib(t.gradients + t.optimizer), gib(t.gradients * memory.SNAPSHOTS),
         gib(memory.sample_bytes(plan.model, t.trained, memory.SNAPSHOTS)), gib(t.traffic)]
        for t in plan.trainings if not t.checkpointing
    ]  # fmt: skip
    return "\n".join(
        [
            "Accelerator memory in GiB; the other weights are in " + plan.settings.dtype + ".",
            *table(header, rows),
            "~ estimated. peak = weights + grad+AdamW + the largest of the three after them: activations of a batch",
            "(recompute: with gradient checkpointing), a step of AdamW, the curvature pass after training.",
            *_half_precision_note(plan),
            f"yes: with {memory.HEADROOM:.0%} of the memory to spare for the driver and for gaps between allocations.",
            *_float32_note(plan),
            "",
            "Files, and a sample of the weights, in GiB, and the GiB that a step of AdamW reads and writes.",
            *table(
                [
                    "trained",
                    "as",
                    "snapshot",
                    "checkpoint with AdamW",
                    f"{memory.SNAPSHOTS} snapshots",
                    "a sample",
                    "AdamW's step",
                ],
                saved,
            ),
            "A member of an ensemble is a snapshot beside the model's weights while it predicts, less than training's",
            "gradients and AdamW. A sample from the Gaussian over snapshots is in float32 and in main memory.",
        ]
    )


def launch_text(plan: Plan) -> str:
    """Launch lines for this model, and the memory of each device."""
    rows = []
    for launch in plan.launches:
        training = launch.training
        parts = (training.weights, training.gradients + training.optimizer, training.activations, training.curvature)
        rows.append(
            [
                launch.name,
                _TRAINED_NAMES[training.trained],
                *(gib(part) for part in (*parts, training.peak)),
                *("yes" if training.fits(size) else "no" for size in plan.settings.memory),
            ]
        )
    sizes = [f"{size:g} GiB" for size in plan.settings.memory]
    header = ["launch", "trained", "weights", "grad+AdamW", "activations ~", "curvature ~", "peak ~", *sizes]
    return "\n".join(
        [
            f"Launch lines, and GiB of each device in {plan.settings.dtype} without gradient checkpointing.",
            *table(header, rows),
            "~ estimated. DDP: with the buckets of gradients. Sharded: with blocks that are all-gathered for a while.",
            *_torchao_note(plan),
            "",
            *(f"{launch.name}:\n  {_folded(launch.command)}" for launch in plan.launches),
            f"Main memory while the model is loaded: {gib(plan.model.weight_bytes)} GiB in every process at once, or "
            "with sharded",
            "weights in one process of a node after the other; beside it up to "
            f"{gib(plan.sizes['mapped_pages'])} GiB of mapped pages of files whose",
            "experts are stacked, which a GPU releases and a CPU keeps.",
            f"Methods that use the evidence then hold the prior mean there, {gib(plan.sizes['prior_mean'])} GiB or "
            "its shard in every process.",
            "On several nodes it is run on each, with HOST the name of one of them and an --output-dir that all see.",
        ]
    )


def _folded(command: str) -> str:
    """A command on one line, or on two if it begins with torchrun."""
    launcher, _, recipe = command.partition(" -m ")
    return command if launcher == "python" else f"{launcher} \\\n    -m {recipe}"


def launch_section(plan: Plan) -> str:
    """The launch lines as markdown, with the command that generates them."""
    settings = plan.settings
    sizes = ",".join(f"{size:g}" for size in settings.memory)
    return (
        f"(from `python -m recipes.plan --model {settings.model} --memory {sizes}`)\n\n"
        f"```text\n{launch_text(plan)}\n```"
    )


def _torchao_note(plan: Plan) -> list[str]:
    if all(launch.training.updates != "stochastic_rounding" for launch in plan.launches):
        return []
    return [
        "Stochastic rounding needs the extra torchao. Without that option a line trains with a float32 copy, which",
        "takes 8 bytes more for each trained weight.",
    ]


def _half_precision_note(plan: Plan) -> list[str]:
    if plan.trainings[0].updates == "nearest":
        return []
    return [
        "Of --half-precision-updates, float32 copy is master_weights (the default); stochastic rounding needs torchao.",
    ]


def _float32_note(plan: Plan) -> list[str]:
    if plan.settings.dtype != "float32" or not any(experts.products.first for experts in plan.model.experts):
        return []
    return [
        "Float32 experts have no grouped kernel on a GPU. A product copies their matrices for every 32 slots, 256 MiB",
        "at a time, and keeps no copy; the gradient of a trained matrix is made of one matrix for every 32 slots.",
    ]
