"""The curvature pass: low-rank K-FAC factors of every expert's second linear layer, in one pass over data.

K-FAC (Martens and Grosse 2015, https://arxiv.org/abs/1503.05671) of the Fisher in its *expand* form is, for an expert
with n_e slots,

    F_e ~ n_e (1/n_e sum a a^T) kron (1/n_e sum E_y[delta delta^T]),

and in its *reduce* form (Eschenhagen et al. 2023, https://arxiv.org/abs/2311.00636) first sums the deltas and averages
the a's of each example and expert. A slot counts when its weight gradient `g a^T` is not exactly zero. This excludes
padding, positions that do not affect a logit, and the zero inputs that some models pass to experts without a token.
Where rounding decides that, in the query projection of a row's first token, see `LayerBatch`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bmoe_lightning.curvature.checkpoint import PassCheckpoint
from bmoe_lightning.curvature.factors import KroneckerFactors, LayerFactors
from bmoe_lightning.curvature.fisher import FisherName
from bmoe_lightning.curvature.gradient_share import GradientShareRecorder
from bmoe_lightning.curvature.layer_sums import LayerSums
from bmoe_lightning.curvature.pass_sums import PassSums
from bmoe_lightning.curvature.sketch import SketchName, check_linear
from bmoe_lightning.curvature.spec import ApproximationName, Curvature
from bmoe_lightning.experts.counted_batch import lockstep
from bmoe_lightning.experts.data_record import DataRecorder
from bmoe_lightning.experts.discovery import find_expert_layers
from bmoe_lightning.experts.fingerprint import weight_fingerprint
from bmoe_lightning.experts.fsdp import check_collective
from bmoe_lightning.experts.logits_contract import ClassLogits
from bmoe_lightning.experts.tied_weights import check_distinct
from bmoe_lightning.experts.types import ExpertLayer
from bmoe_lightning.experts.used_weights import UsedWeights
from bmoe_lightning.experts.weight_record import weight_record
from bmoe_lightning.experts.weights import down_proj_weights
from bmoe_lightning.utils.distributed import (
    broadcast_,
    failing_together,
    num_processes,
    process_rank,
    sum_over_processes,
)
from bmoe_lightning.utils.fit_warnings import warn_of_fit
from bmoe_lightning.utils.random_state import forked_random_state

_UNDERFLOWED_SHARE = 1e-3


def collect_factors(
    model: nn.Module,
    class_logits: ClassLogits,
    batches: Iterable[Any],
    *,
    rank: int = 10,
    fisher: FisherName = "exact",
    approximation: ApproximationName = "expand",
    sketch: SketchName = "auto",
    layers: Sequence[ExpertLayer] | None = None,
    num_examples: int | Callable[[int], int] | None = None,
    seed: int = 0,
    distributed: bool = False,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 100,
    device: torch.device | str | None = None,
    record: DataRecorder | None = None,
    share: GradientShareRecorder | None = None,
) -> KroneckerFactors:
    """Collect the curvature of every expert's second linear layer.

    The model runs in evaluation mode with frozen parameters; its modes, gradients and the global random state are
    restored. Each batch takes one forward pass and K - 1 (`exact`, K the number of classes that an example has at
    most) or 1 (`mc`, `empirical`) backward passes to the experts' outputs. A batch that does not fit in memory runs in
    parts; see `run_in_parts`.

    Args:
        model: Module with expert layers.
        class_logits: Function `(model, batch) -> (logits [B, K], labels [B] or None)`.
        batches: Iterable of batches, which are passed to `class_logits`, or of `CountedBatch`es.
        rank: Number of eigenpairs stored per factor.
        fisher: Labels of the Fisher: `exact` (all classes), `mc` (one sampled label) or `empirical` (the true label).
        approximation: K-FAC form, `expand` or `reduce`.
        sketch: Low-rank algorithm: `auto`, `nystrom`, `rsvd` or `exact`; see `make_sketch`.
        layers: Expert layers; by default all that `find_expert_layers` finds.
        num_examples: Number of examples that the factors are scaled to when `batches` is a subset of the data: the
            curvature is multiplied by its ratio to the number of examples seen (by all ranks). Or a function of the
            number seen. By default the number seen.
        seed: Seed for sampled labels and random test matrices.
        distributed: Whether all ranks of torch.distributed's default group call this, each with its shard of the data,
            which may be empty; where weights are sharded, in equally many batches of equal sizes. Sums and counts are
            all-reduced, and every rank gets the same factors. Sampled labels (`mc`) come from a separate random stream
            on each rank, so the factors then equal those of one process in distribution only.
        checkpoint: File for the running sums, from which a killed pass resumes: called again with the same weights,
            data and options, it skips the batches that were already added without running the model on them, and
            returns the factors of an uninterrupted pass. Several ranks write separate files beside it. It is not
            removed: call `remove_checkpoint` once the factors, or results computed from them, are saved.
        checkpoint_every: Number of batches (of each rank) between two checkpoints; a shorter pass writes none.
        device: Device to which the factors of each finished layer are moved; by default that of the layer.
        record: Recorder of the data, which resumes with the pass.
        share: Recorder of the share of the trained weights' gradient that `layers` have, which resumes with the pass.
            It runs the batches that it wants once more; the factors are the same.

    Returns:
        The factors, in float32 or, for a float64 model, float64.

    Raises:
        ValueError: If an option is unknown; `batches` is empty; the logits are invalid; a factor is not finite (the
            message names layer and expert); layers share a weight, a name or an index; `rsvd` is used with several
            ranks; or the checkpoint is damaged or from a pass with other weights, options or batches.
        OSError: If the checkpoint cannot be written; the previous one is unchanged.
        InterruptedPassError: If a signal stopped another rank (seen where ranks synchronise).

    Warns:
        FitWarning: If more than one in a thousand gradients has underflowed in float16 (see
            `bmoe_lightning.experts.gradient_scale`).
        UserWarning: If a layer processed no token that affects a logit, so that its posterior is the prior; or if the
            checkpoints of several ranks have no write in common, so that the pass starts from the beginning.
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    options = Curvature(rank=rank, fisher=fisher, approximation=approximation, sketch=sketch)  # validates the names
    if distributed:
        check_linear(sketch)
    if isinstance(num_examples, int) and num_examples < 1:
        raise ValueError(f"num_examples must be at least 1, got {num_examples}")
    layers = find_expert_layers(model) if layers is None else list(layers)
    check_distinct(model, layers)
    check_collective(model, distributed=distributed)
    generator = torch.Generator().manual_seed(seed + (process_rank() * 7_368_787 if distributed else 0))
    fingerprint = weight_fingerprint(model, layers)
    outside = UsedWeights(model, layers)
    class_logits = outside.observed(class_logits)
    record = record or DataRecorder(distributed=distributed)
    share = share or GradientShareRecorder.unused()
    kept = PassCheckpoint(
        checkpoint,
        checkpoint_every,
        fingerprint,
        {
            "rank": rank,
            "fisher": fisher,
            "approximation": approximation,
            "sketch": sketch,
            "seed": seed,
            "layers": [asdict(layer) for layer in layers],
            "processes": num_processes() if distributed else 1,
            "process": process_rank() if distributed else 0,
        },
        distributed=distributed,
        record=record,
        used=outside,
        share=share,
    )
    sums = PassSums(
        model,
        layers,
        class_logits,
        options,
        seed=seed,
        generator=generator,
        begun=lambda found: kept.restore(found, generator),
        checked=kept.progress.checked,
    )
    used = kept.progress.examples
    with forked_random_state(), failing_together(distributed=distributed):
        for batch in kept.remaining(lockstep(model, batches)):
            added = sums.add(batch)
            used += added.num_counted
            record.add(added.logits, added.labels, added.num_counted)
            share.add(model, layers, class_logits, added.batch, added.num_passes)
            kept.batch_done(sums.layers, generator, used, checked=sums.checked)
        if not sums.layers and (distributed or kept.resumed):
            # A rank without a batch contributes zeros, or the sums of its checkpoint.
            sums.begin([_parameter_of(model, layer) for layer in layers])
        kept.pass_done(sums.layers, generator, used, checked=sums.checked)
    if distributed:
        used = _sum_up(sums.layers, used)
    if used == 0:
        raise ValueError("no batch to collect curvature from: `batches` is empty; pass at least one")
    num_examples = _represented(num_examples, used)
    _warn_of_underflow(sums.layers)
    with failing_together(distributed=distributed):
        finished = tuple(layer_sums.finish(num_examples / used).to(device) for layer_sums in sums.layers)
    if distributed:
        # Decompositions of equal sums may differ between machines in rounding and in sign.
        broadcast_([tensor for layer in finished for tensor in layer.tensors().values()])
    _warn_of_unseen(finished)
    return KroneckerFactors(
        finished,
        rank=rank,
        fisher=fisher,
        approximation=approximation,
        sketch=sketch,
        num_examples=num_examples,
        num_examples_used=used,
        expert_layers=tuple(layers),
        fingerprint=fingerprint,
        weights=outside.added_to(weight_record(model, layers), distributed=distributed),
    )


def prior_factors(model: nn.Module, layers: Sequence[ExpertLayer]) -> KroneckerFactors:
    """Factors of rank 0, without a pass over data: the posterior of every expert is the prior.

    Args:
        model: Module with these layers.
        layers: Layers from `find_expert_layers` or `find_linear_layers`.
    """
    empty = []
    for layer in layers:
        like = _parameter_of(model, layer)
        dtype = torch.promote_types(like.dtype, torch.float32)
        count = layer.num_experts
        # On the CPU: they are empty, and the posterior moves them to the device where they are used.
        none = torch.zeros(count, 0, dtype=dtype)
        zeros = torch.zeros(count, dtype=torch.float64)
        a_basis, g_basis = (torch.zeros(count, width, 0, dtype=dtype) for width in (layer.d_in, layer.d_out))
        empty.append(LayerFactors(layer.name, layer.index, zeros, a_basis, none, g_basis, none, zeros, zeros))
    return KroneckerFactors(
        tuple(empty),
        rank=0,
        fisher="exact",
        approximation="expand",
        sketch="auto",
        num_examples=0,
        num_examples_used=0,
        expert_layers=tuple(layers),
        fingerprint=weight_fingerprint(model, layers),
    )


def _sum_up(sums: Sequence[LayerSums], used: int) -> int:
    """All-reduce the sums of all ranks in place; returns the total number of examples."""
    count = torch.tensor([used], dtype=torch.int64)
    sum_over_processes([count, *(tensor for layer_sums in sums for tensor in layer_sums.tensors())])
    return int(count)


def _represented(num_examples: int | Callable[[int], int] | None, used: int) -> int:
    """The number of examples that the factors are scaled to."""
    if num_examples is None:
        return used
    return num_examples if isinstance(num_examples, int) else num_examples(used)


def _parameter_of(model: nn.Module, layer: ExpertLayer) -> Tensor:
    """A weight of a layer, for its device and dtype."""
    return next(iter(down_proj_weights(model, layer).values()))


def _warn_of_unseen(layers: Sequence[LayerFactors]) -> None:
    unseen = [layer.name for layer in layers if not bool(layer.slots.any())]
    if unseen:
        warnings.warn(
            f"no token that affects a logit went through {', '.join(unseen[:4])}{' and more' if unseen[4:] else ''}, "
            "so the posterior of these layers is the prior. Check that these data do not use them, and that the model "
            "runs their modules rather than multiplying with the weights directly.",
            stacklevel=3,
        )


def _warn_of_underflow(sums: Sequence[LayerSums]) -> None:
    underflowed = sum(float(x.underflowed) for x in sums)
    counted = sum(float(x.slots.sum()) for x in sums)
    if underflowed > _UNDERFLOWED_SHARE * counted:
        warn_of_fit(
            f"gradients of {underflowed:.0f} of {counted:.0f} routed tokens are too small for float16 and underflowed "
            "in part, although they were scaled, and those of others may be zero; collect the curvature in bfloat16 or "
            "float32",
            stacklevel=3,
        )
