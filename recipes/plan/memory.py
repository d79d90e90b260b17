"""Bytes of weights, optimiser states, factors and files, which are exact, and of passes, which are estimated."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import lru_cache

import torch
from torch import Tensor

from bmoe_lightning.curvature import LayerFactors
from bmoe_lightning.curvature.sketch import EXACT_WIDTH, make_sketch
from bmoe_lightning.curvature.spec import CACHE_BYTES
from bmoe_lightning.laplace.compact_cache import compact_bytes
from bmoe_lightning.laplace.validation_cache import exact_terms_fit
from bmoe_lightning.optim import HalfPrecisionUpdates
from bmoe_lightning.optim.master_weights import CHUNK
from recipes.plan.activations import (
    Precision,
    adding_bytes,
    entrance_bytes,
    kernel_bytes,
    layer_gradient_bytes,
    product_bytes,
    saved_bytes,
    tapped_bytes,
)
from recipes.plan.architecture import Architecture, Experts
from recipes.plan.compute import Workload, prediction_sweeps

SNAPSHOTS = 5
LPO_BINS = 128
HEADROOM = 0.05
# Header of a posterior without layers and tensors: format, rank, Fisher, fingerprint, numbers of examples.
_HEADER = 520


@dataclass(frozen=True)
class Training:
    """Accelerator memory of a training run, in bytes.

    Attributes:
        trained: Trained weights, `down_proj` or `experts`.
        trained_dtype: Dtype of the trained weights; everything else is in the model's dtype.
        updates: How trained weights in half precision are updated; see `bmoe_lightning.optim.make_adamw`.
        checkpointing: Whether activations are recomputed in the backward pass (gradient checkpointing).
        weights: Bytes of all parameters.
        gradients: Bytes of the gradients of the trained weights.
        optimizer: AdamW's two moments and step counts, and the float32 copy of the trained weights, if there is one.
        activations: Tensors saved for the backward pass, estimated, with the gradients of one block.
        step: Transients of AdamW during a step, when no activations are alive.
        curvature: Transients of the curvature pass after training, while gradients and moments are still alive.
    """

    trained: str
    trained_dtype: str
    updates: HalfPrecisionUpdates
    checkpointing: bool
    weights: int
    gradients: int
    optimizer: int
    activations: int
    step: int
    curvature: int

    @property
    def peak(self) -> int:
        """Peak memory."""
        return self.weights + self.gradients + self.optimizer + max(self.activations, self.step, self.curvature)

    @property
    def traffic(self) -> int:
        """Bytes that a step of AdamW reads and writes on one device: it is bound by memory, not by operations.

        It reads gradients, reads and writes moments and the float32 copy, and reads and writes the weights, or with a
        copy only writes them.
        """
        weights = self.gradients * (1 if self.updates == "master_weights" else 2)
        return self.gradients + 2 * self.optimizer + weights

    def fits(self, gib: float) -> bool:
        """Whether the peak fits into a memory of that many GiB with 5 % to spare for the driver and fragmentation."""
        return self.peak <= gib * 2**30 * (1 - HEADROOM)


def trained_size(model: Architecture, trained: str) -> tuple[int, int]:
    """Numbers of trained weights and of trained parameter tensors."""
    if trained == "experts":
        return model.routed, sum(experts.all_tensors for experts in model.experts)
    return model.second, sum(experts.second_tensors for experts in model.experts)


def optimizer_bytes(weights: int, tensors: int, size: int, updates: HalfPrecisionUpdates = "nearest") -> int:
    """AdamW's states after a step: two moments in the dtype of the weights, and a float32 step count a tensor.

    With master weights the moments are in float32, beside a float32 copy of the weights.
    """
    return (3 * weights * 4 if updates == "master_weights" else 2 * weights * size) + 4 * tensors


def step_bytes(model: Architecture, trained: str, size: int, updates: HalfPrecisionUpdates = "nearest") -> int:
    """Transients of a step of AdamW on a GPU: torch's copies all trained weights, the others go through them in parts.

    With master weights a part has its gradients and a root of the second moments in float32.
    torchao's compiled update draws a 32-bit number for each weight of one tensor.
    """
    weights, _ = trained_size(model, trained)
    largest = max(_largest_tensor(experts, trained) for experts in model.experts)
    if updates == "nearest":
        return weights * size
    if updates == "stochastic_rounding":
        return 4 * largest
    return 8 * max(largest, min(weights, CHUNK))


def _largest_tensor(experts: Experts, trained: str) -> int:
    """Number of weights of the largest trained tensor of a layer; without biases all are equally large."""
    second = experts.layer.num_experts * experts.second
    largest = -(-second // experts.second_tensors)
    others = experts.all_tensors - experts.second_tensors
    return max(largest, -(-(experts.parameters - second) // others)) if trained == "experts" and others else largest


def layer_factors(experts: Experts, rank: int) -> LayerFactors:
    """The factors of one layer, on the meta device."""
    layer = experts.layer
    count = layer.num_experts
    ranks = {"a": (layer.d_in, min(rank, layer.d_in)), "g": (layer.d_out, min(rank, layer.d_out))}
    tensors: dict[str, Tensor] = {"slots": _meta(count, dtype=torch.float64)}
    for side, (width, kept) in ranks.items():
        tensors |= {
            f"{side}_basis": _meta(count, width, kept),
            f"{side}_eigenvalues": _meta(count, kept),
            f"{side}_trace": _meta(count, dtype=torch.float64),
        }
    return LayerFactors(layer.name, layer.index, **tensors)


def factor_bytes(model: Architecture, rank: int, dtype: torch.dtype = torch.float32) -> int:
    """All tensors of the factors, in memory and in the posterior's file alike, with bases of a dtype."""
    return sum(_layer_factor_bytes(experts, rank, dtype) for experts in model.experts)


def _layer_factor_bytes(experts: Experts, rank: int, dtype: torch.dtype = torch.float32) -> int:
    return sum(tensor.nbytes for tensor in layer_factors(experts, rank).to(dtype=dtype).tensors().values())


def posterior_file_bytes(model: Architecture, rank: int) -> int:
    """The posterior's file: factors, float64 precisions, sampled weights, a header with every layer and tensor."""
    offset, entries = 8 * len(model.experts), {}
    for position, experts in enumerate(model.experts):
        for name, tensor in layer_factors(experts, rank).tensors().items():
            places = [offset, offset + tensor.nbytes]
            offset = places[1]
            entries[f"{position}.{name}"] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": places}
    layers = [asdict(experts.layer) for experts in model.experts]
    digests = dict.fromkeys(entries, 64 * "0")  # SHA-256 of each tensor
    description = json.dumps([layers, [{"name": layer["name"], "index": layer["index"]} for layer in layers], digests])
    header = json.dumps(entries, separators=(",", ":")) + json.dumps(description)
    return offset + model.record_bytes + len(header) + _HEADER


def sketch_bytes(model: Architecture, rank: int) -> int:
    """State of the curvature pass: the sums of all layers, before they become factors."""
    return sum(
        8 * experts.layer.num_experts
        + 8  # the number of tokens with faint gradients
        + _sketch_state(experts.layer.num_experts, experts.layer.d_in, rank)
        + _sketch_state(experts.layer.num_experts, experts.layer.d_out, rank)
        for experts in model.experts
    )


@lru_cache
def _sketch_state(num_experts: int, width: int, rank: int) -> int:
    sketch = make_sketch(
        "auto",
        num_experts,
        width,
        rank,
        device=torch.device("meta"),
        dtype=torch.float32,
        generator=torch.Generator().manual_seed(0),
    )
    return sum(value.nbytes for value in vars(sketch).values() if isinstance(value, Tensor))


def curvature_transients(
    model: Architecture, work: Workload, precision: Precision, *, checkpointing: bool = False
) -> int:
    """Memory of the curvature pass beyond the weights, estimated.

    The state of all sketches, the tensors that autograd saves, the inputs of all slots, and the gradient of one layer
    at a time, which is added to its sketch before the next. Backward passes are sequential, so their number has no
    effect.

    Args:
        model: Sizes of the model.
        work: Batch.
        precision: Bytes of a weight.
        checkpointing: Whether activations are recomputed for every backward pass.
    """
    gradient = max(layer_gradient_bytes(experts, work, precision) for experts in model.experts)
    adding = max(adding_bytes(experts, work, precision) for experts in model.experts)
    moment = max(adding, product_bytes(model, work, precision, None))
    batch = tapped_bytes(model, work, precision, checkpointing=checkpointing) + gradient + moment
    return sketch_bytes(model, work.rank) + max(batch, _finishing_bytes(model, work.rank))


def prediction_transients(
    model: Architecture, work: Workload, precision: Precision, *, checkpointing: bool = False, offload: bool = False
) -> int:
    """Memory of a prediction beyond the weights, the factors included, estimated.

    The gradients of all K - 1 passes are alive together, in as many layers as `num_sweeps` allows.

    Args:
        model: Sizes of the model.
        work: Batch.
        precision: Bytes of a weight.
        checkpointing: Whether activations are recomputed for every backward pass.
        offload: Whether the factors stay in CPU memory, so that those of one layer at a time are on the device.
    """
    slots = sum(work.positions * experts.top_k * experts.layer.d_out for experts in model.experts)
    gradients = precision.second * slots
    # With one module for each expert, the gradients of the last pass are alive twice: separately and concatenated.
    at_once = -(-len(model.experts) // prediction_sweeps(model, work, precision.second))
    joining = gradients if not all(experts.products.second for experts in model.experts) else 0
    finding = joining + product_bytes(model, work, precision, None)
    kernels = max(kernel_bytes(experts, work) for experts in model.experts)
    factors = [_layer_factor_bytes(experts, work.rank) for experts in model.experts]
    kept = (max(factors) if offload else sum(factors)) + work.contrasts * gradients * at_once // len(model.experts)
    if checkpointing:
        # Passes that end at the last layer recompute its block, and tensors they do not use stay alive: two blocks.
        kept += 2 * max(saved_bytes(model, work, precision, None))
    return kept + tapped_bytes(model, work, precision, checkpointing=checkpointing) + max(finding, kernels)


def prior_mean_bytes(model: Architecture) -> int:
    """The weights from before fine-tuning that the evidence needs: copies of the second layers, in main memory."""
    return model.second * model.dtype.itemsize


def mapped_bytes(model: Architecture) -> int:
    """Mapped pages of a checkpoint's files beside the weights, in main memory.

    Transformers maps the files. Most weights are views of the mapping, which takes their place, but experts that the
    model holds stacked are copied from matrices of single experts, whose pages stay mapped as long as any view. On a
    GPU all pages are released once the weights are there.
    """
    return sum(experts.parameters for experts in model.experts if experts.second_tensors == 1) * model.dtype.itemsize


def sample_bytes(model: Architecture, trained: str, snapshots: int) -> int:
    """A sample of the trained weights from a Gaussian over snapshots, and what drawing it takes, in main memory."""
    weights, _ = trained_size(model, trained)
    return 4 * (weights + (snapshots + 3) * max(_largest_tensor(experts, trained) for experts in model.experts))


def lpo_cache_bytes(model: Architecture, work: Workload, examples: int) -> int:
    """The validation cache of LPO, on the CPU; up to twice that temporarily while its batches are concatenated.

    Compact terms are counted at their largest, as for a curvature over twelve decades.
    """
    layers, classes, contrasts = len(model.experts), work.classes, work.contrasts
    terms = examples * layers * (1 + LPO_BINS) * contrasts**2
    output = examples * (classes + 1)
    if exact_terms_fit(contrasts, 8 * terms, CACHE_BYTES):
        return 8 * (output + examples * classes * contrasts + terms + layers * LPO_BINS)
    return 8 * output + min(CACHE_BYTES, examples * compact_bytes(classes, layers))


def training_memory(
    model: Architecture,
    work: Workload,
    trained: str,
    trained_dtype: torch.dtype,
    *,
    checkpointing: bool,
    updates: HalfPrecisionUpdates = "nearest",
    dropout: bool = True,
) -> Training:
    """Memory of a training run and of the curvature pass at its end, while gradients and moments are still alive.

    Args:
        model: Sizes of the model.
        work: Batch of training and curvature.
        trained: Trained weights, `down_proj` or `experts`.
        trained_dtype: Dtype of the trained weights.
        checkpointing: Whether training uses gradient checkpointing.
        updates: How trained weights in half precision are updated.
        dropout: Whether there is dropout in the experts.
    """
    size, own = model.dtype.itemsize, trained_dtype.itemsize
    precision = Precision(size, own if trained == "experts" else size, own)
    weights, tensors = trained_size(model, trained)
    saved = saved_bytes(model, work, precision, trained, dropout=dropout)
    # The gradients of saved tensors are computed, used and freed during the backward pass: one block at a time.
    block = max(saved) + product_bytes(model, work, precision, trained)
    return Training(
        trained=trained,
        trained_dtype=str(trained_dtype).removeprefix("torch."),
        updates=updates,
        checkpointing=checkpointing,
        weights=model.weight_bytes + weights * (own - size),
        gradients=weights * own,
        optimizer=optimizer_bytes(weights, tensors, own, updates),
        activations=block + (max(saved) + entrance_bytes(model, work) if checkpointing else sum(saved)),
        step=step_bytes(model, trained, own, updates),
        curvature=curvature_transients(model, work, precision, checkpointing=checkpointing),
    )


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _finishing_bytes(model: Architecture, rank: int) -> int:
    """Transients of decomposing the sums of the last layer, with the factors of the others alive."""
    layers = (experts.layer for experts in model.experts)
    # Float64 copies of a sketch, or the eigenvectors of a full sum.
    widest = max(
        layer.num_experts * (12 * width**2 if width <= EXACT_WIDTH else 32 * width * min(4 * rank, width))
        for layer in layers
        for width in (layer.d_in, layer.d_out)
    )
    return factor_bytes(model, rank) + widest
