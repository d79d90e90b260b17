"""Bytes of weights, optimiser states, factors and files, which are exact, and of activations, which are estimated.

Autograd saves for backward, in each decoder block above the first one with experts (below it nothing requires a
gradient), over `n` tokens and with frozen weights unless noted:

- for every matrix that tokens pass through, its output; for one that maps back to the model's width, its input (a
  product of activations, or the attention's output); for a gate of width one, its other factor;
- for every normalisation, its input in float32;
- for every slot, the first matrices' output, the activated gate, and the second matrix's output before the routing
  weight; with trained weights also their inputs, and with dropout a mask of one byte.

Where torch's grouped kernel does not support the experts' dtype or widths, a product saves its input with frozen
weights too. It then pads slots to blocks and copies a matrix for each block, a limited number at a time; these copies
are not saved.

Attention is assumed to use one of torch's fused kernels, which save no scores.
"""

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
from recipes.plan.architecture import Architecture, Experts
from recipes.plan.compute import Workload, prediction_sweeps

SNAPSHOTS = 5
LPO_BINS = 128
HEADROOM = 0.05
# Of the dtypes of a plan, torch's grouped product supports bfloat16 alone on a GPU.
_KERNEL_BYTES = 2
# It requires rows of a multiple of this many bytes.
_KERNEL_ALIGNMENT = 16
# Rows of a block in which experts share one batched product, where no grouped kernel fits, and how many weights are
# copied for such blocks at a time.
_BLOCK_ROWS = 32
_COPIED_WEIGHTS = 1 << 26
# Header of a posterior without layers and tensors: format, rank, Fisher, fingerprint, numbers of examples.
_HEADER = 520
# A chunk of the prediction's kernels: 2^24 float32 values, and their intermediate results.
_CHUNK = 5 * (1 << 24)


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


@dataclass(frozen=True)
class Precision:
    """Bytes of a weight: of the always frozen ones, of the experts' first matrices and of their second ones."""

    frozen: int
    first: int
    second: int


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
    gradient = max(_layer_gradient_bytes(experts, work, precision) for experts in model.experts)
    adding = max(_adding_bytes(experts, work, precision) for experts in model.experts)
    moment = max(adding, _product_bytes(model, work, precision, None))
    batch = _tapped_bytes(model, work, precision, checkpointing=checkpointing) + gradient + moment
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
    finding = joining + _product_bytes(model, work, precision, None)
    kernels = max(_kernel_bytes(experts, work) for experts in model.experts)
    factors = [_layer_factor_bytes(experts, work.rank) for experts in model.experts]
    kept = (max(factors) if offload else sum(factors)) + work.contrasts * gradients * at_once // len(model.experts)
    if checkpointing:
        # Passes that end at the last layer recompute its block, and tensors they do not use stay alive: two blocks.
        kept += 2 * max(saved_bytes(model, work, precision, None))
    return kept + _tapped_bytes(model, work, precision, checkpointing=checkpointing) + max(finding, kernels)


def prior_mean_bytes(model: Architecture) -> int:
    """The weights from before fine-tuning that the evidence needs: copies of the second layers, in main memory."""
    return model.second * model.dtype.itemsize


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


def saved_bytes(
    model: Architecture, work: Workload, precision: Precision, trained: str | None, *, dropout: bool = False
) -> list[int]:
    """Bytes that autograd saves for each block, estimated as the module describes.

    Args:
        model: Sizes of the model.
        work: Batch.
        precision: Bytes of a weight.
        trained: Trained weights, `down_proj`, `experts`, or None where gradients end at the second matrices' outputs.
        dropout: Whether there is dropout in the experts.
    """
    kept = []
    for position, block in enumerate(model.blocks):
        above, total = position > model.first, 0
        if above:
            total += 4 * work.positions * model.hidden * block.norms
            total += precision.frozen * work.positions * sum(_side(*shape, model.hidden) for shape in block.matrices)
        if position >= model.first:
            for experts in block.experts:
                a_slot = _slot_bytes(experts, precision, trained, dropout=dropout, above=above)
                total += work.positions * experts.top_k * a_slot
        kept.append(total)
    return kept


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
    block = max(saved) + _product_bytes(model, work, precision, trained)
    return Training(
        trained=trained,
        trained_dtype=str(trained_dtype).removeprefix("torch."),
        updates=updates,
        checkpointing=checkpointing,
        weights=model.weight_bytes + weights * (own - size),
        gradients=weights * own,
        optimizer=optimizer_bytes(weights, tensors, own, updates),
        activations=block + (max(saved) + _entrances(model, work) if checkpointing else sum(saved)),
        step=step_bytes(model, trained, own, updates),
        curvature=curvature_transients(model, work, precision, checkpointing=checkpointing),
    )


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _side(out: int, into: int, hidden: int) -> int:
    """Values for each token that autograd saves for a frozen matrix."""
    return into if out in (1, hidden) else out


def _slot_bytes(experts: Experts, precision: Precision, trained: str | None, *, dropout: bool, above: bool) -> int:
    d_in, d_out = experts.layer.d_in, experts.layer.d_out
    total = 0
    if above or trained == "experts":
        total += precision.first * (experts.first_width + (d_in if experts.gated else 0))
    if above:
        total += precision.second * d_out
    if trained is not None:
        total += precision.second * d_in
    elif above and precision.first != precision.second and not _has_kernel(experts, precision.second):
        total += precision.second * d_in  # in the dtype of the second matrices; taps record it in that of the first
    if trained == "experts" or (above and experts.products.first and not _has_kernel(experts, precision.first)):
        total += precision.first * d_out
    return total + (d_in if dropout and (above or trained == "experts") else 0)


def _has_kernel(experts: Experts, size: int) -> bool:
    """Whether torch's grouped product on a GPU supports weights of this size in bytes, if experts share a product."""
    if not experts.products.second:
        return True
    widths = (experts.layer.d_in, experts.layer.d_out, experts.first_width)
    return size == _KERNEL_BYTES and all(width * size % _KERNEL_ALIGNMENT == 0 for width in widths)


def _product_bytes(model: Architecture, work: Workload, precision: Precision, trained: str | None) -> int:
    """Transient memory of the largest product of slots and their experts' matrices without the grouped kernel.

    It holds the incoming gradient, the padded blocks on both sides, and copies of matrices or a second copy of the
    product; for the gradient of a trained matrix, one matrix for every block.
    """
    most = 0
    for experts in model.experts:
        d_in, d_out = experts.layer.d_in, experts.layer.d_out
        slots, blocks = work.positions * experts.top_k, _product_blocks(experts, work)
        shared = [(d_in, d_out, precision.second, trained is not None)]
        if experts.products.first:
            shared.append((d_out, experts.first_width, precision.first, trained == "experts"))
        for into, out, size, has_gradient in shared:
            if not _has_kernel(experts, size):
                at_a_time = min(blocks, max(1, _COPIED_WEIGHTS // (into * out)))
                moment = max(at_a_time * into * out, blocks * _BLOCK_ROWS * max(into, out))
                gradient = (blocks + experts.layer.num_experts) * into * out if has_gradient else 0
                rows = slots * out + blocks * _BLOCK_ROWS * (into + out)
                most = max(most, size * (rows + max(moment, gradient)))
    return most


def _product_blocks(experts: Experts, work: Workload) -> int:
    return -(-work.positions * experts.top_k // _BLOCK_ROWS) + experts.layer.num_experts


def _layer_gradient_bytes(experts: Experts, work: Workload, precision: Precision) -> int:
    """The gradient of one pass with respect to the outputs of all slots of a layer; twice for separate modules."""
    copies = 1 if experts.products.second else 2
    return copies * precision.second * work.positions * experts.top_k * experts.layer.d_out


def _tapped_bytes(model: Architecture, work: Workload, precision: Precision, *, checkpointing: bool) -> int:
    """Bytes alive after a tapped forward pass: saved tensors, all inputs, and the outputs at which gradients end."""
    inputs = sum(work.positions * experts.top_k * experts.layer.d_in for experts in model.experts)
    ends = sum(work.positions * e.top_k * e.layer.d_out for e in model.blocks[model.first].experts)
    saved = saved_bytes(model, work, precision, None)
    kept = max(saved) + _entrances(model, work) if checkpointing else sum(saved)
    return kept + precision.first * inputs + precision.second * ends


def _entrances(model: Architecture, work: Workload) -> int:
    """Bytes that gradient checkpointing saves: the input of every block."""
    return model.dtype.itemsize * work.positions * model.hidden * len(model.blocks)


def _adding_bytes(experts: Experts, work: Workload, precision: Precision) -> int:
    """Transients of adding one layer's slots to its sketches: selected, sorted, float32, squared, padded to blocks."""
    slots, blocks = work.positions * experts.top_k, _product_blocks(experts, work)

    def side(width: int, size: int) -> int:
        a_value = 2 * size + 4 + (4 if size < 4 else 0)
        columns = width if width <= EXACT_WIDTH else min(4 * work.rank, width)
        sums = (blocks + experts.layer.num_experts) * width * columns
        layout = 4 * (blocks * _BLOCK_ROWS * (width + columns) + sums)
        return slots * (a_value * width + 4 * columns) + layout

    return max(side(experts.layer.d_in, precision.first), side(experts.layer.d_out, precision.second))


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


def _kernel_bytes(experts: Experts, work: Workload) -> int:
    """A chunk of one layer's slots in float32: inputs, gradients, and the gradients summed over pairs."""
    slots, gradients = work.positions * experts.top_k, work.contrasts * experts.layer.d_out
    return min(_CHUNK, 8 * slots * (experts.layer.d_in + gradients))
