"""Other libraries on the same work, on models that are small enough for them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bmoe_lightning import LaplacePosterior
from bmoe_lightning.curvature import KroneckerFactors
from bmoe_lightning.curvature.sketch import EXACT_WIDTH, SketchName
from recipes.benchmark.measure import Pass, Peer, Section, peak_megabytes
from recipes.benchmark.peer_tasks import (
    FullFactors,
    covariance_by_jacobian,
    curvlinops_factors,
    decomposed,
    laplace_torch_prediction,
)
from recipes.benchmark.separate_experts import separate_workload
from recipes.benchmark.workload import Preset, Workload
from recipes.common.timing import in_turn, seconds

Task = Callable[[], Any]

SAME = 1e-4
"""Relative difference up to which two float32 results count as equal."""

_BATCHES = 4


def measure_peers(preset: Preset, repeats: int, device: torch.device, say: Callable[[str], None]) -> Section:
    """Time every peer interleaved with this library; the error of a peer that fails is in its row."""
    shape = preset.peers
    compare = partial(compared, repeats=repeats, device=device)
    say("peers: torch.func.jacrev")
    fused = Workload(shape, device)
    posterior = LaplacePosterior(without_curvature(fused.collect([fused.batch])))
    class_logits = fused.class_logits()
    jacobian = compare(
        "torch.func.jacrev",
        "logit covariance of a batch under the prior",
        lambda: partial(covariance_by_jacobian, fused),
        lambda: posterior.logit_covariance(fused.model, class_logits, fused.batch)[1],
        known=fused.tensors(),
        same_answer=True,
    )
    say("peers: laplace-torch")
    separate = separate_workload(shape, device)
    laplace = compare(
        "laplace-torch",
        "K-FAC posterior of a batch (exact Fisher) and prediction of it",
        lambda: laplace_torch_prediction(separate),
        lambda: _fitted(separate).predict(separate.model, separate.class_logits(), separate.batch),
        known=separate.tensors(),
    )
    factors = []
    for of_factors in preset.factor_peers:
        say(f"peers: curvlinops, hidden {of_factors.hidden}, {of_factors.experts} experts")
        factors += _factor_rows(separate_workload(of_factors, device), compare)
    return Section(
        "peers",
        "Beside peers",
        (
            f"torch.func.jacrev and laplace-torch: {shape}. torch.func.jacrev runs on the fused model, the others on "
            "the same weights as nn.Linear experts in an nn.ModuleList. Memory is the peak beyond model and batch. "
            "curvlinops: the seconds of one further batch of a pass that runs evenly, without set-up and decomposition "
            "on either side; or of a whole pass with both. Its factors are full matrices and include slots that affect "
            "no logit.",
        ),
        peers=(jacobian, laplace, *factors),
    )


def _factor_rows(work: Workload, compare: Callable[..., Peer]) -> list[Peer]:
    """K-FAC beside curvlinops: the same full sums, the low-rank sketch instead, and with the decomposition."""
    shape = work.shape
    size = f"d {shape.hidden} and {shape.intermediate}, {shape.experts} experts"
    compare = partial(compare, "curvlinops", known=work.tensors())

    def further_batch(sketch: SketchName, note: str) -> Peer:
        return compare(
            f"K-FAC of a further batch, {size}; {note}",
            lambda: Pass(curvlinops_factors(work), work.batch, to_end=True),
            Pass(partial(work.collect, sketch=sketch), work.batch),
            clock=Pass.further_batch,
        )

    rows = [further_batch("exact", "full sums on both sides")]
    if shape.hidden > EXACT_WIDTH:
        rows.append(further_batch("nystrom", f"full sums there, rank {shape.rank} here"))
    else:
        batches = [work.batch] * _BATCHES
        rows.append(
            compare(
                f"K-FAC of {_BATCHES} batches, {size}; rank {shape.rank} on both sides",
                lambda: partial(_decomposed_by_peer, curvlinops_factors(work), batches, shape.rank),
                partial(work.collect, batches, sketch="exact"),
            )
        )
    return rows


def _decomposed_by_peer(factors: Callable[[Iterable[Any]], FullFactors], batches: Iterable[Any], rank: int) -> None:
    decomposed(factors(batches), rank)


def compared(
    name: str,
    work: str,
    make_peer: Callable[[], Task],
    ours: Task,
    *,
    repeats: int,
    device: torch.device,
    known: list[Tensor] | None = None,
    same_answer: bool = False,
    clock: Callable[[Any, torch.device], float] = seconds,
) -> Peer:
    """Time a peer interleaved with this library; an exception of the peer becomes the row's error.

    Args:
        name: Name of the peer.
        work: Work that both do, for the table.
        make_peer: Function that imports the peer and returns its computation.
        ours: Computation of this library.
        repeats: Number of rounds.
        device: Device that both run on.
        known: Tensors that were allocated before, left out of the memory.
        same_answer: Whether both have to return the same tensor.
        clock: Function that runs a computation and returns the seconds that count.
    """
    known = [] if known is None else known
    our_memory = peak_megabytes(ours, device, known)
    try:
        theirs = make_peer()
        difference = relative_difference(theirs(), ours()) if same_answer else None
        memory = peak_megabytes(theirs, device, known)
        times = in_turn({"theirs": theirs, "ours": ours}, repeats, device, clock)
    except Exception as error:  # noqa: BLE001  (any exception of a peer is its result)
        alone = in_turn({"ours": ours}, repeats, device, clock)["ours"]
        return Peer(name, work, (), alone, None, our_memory, None, f"{type(error).__name__}: {error}")
    return Peer(name, work, times["theirs"], times["ours"], memory, our_memory, difference, None)


def relative_difference(found: Tensor, expected: Tensor) -> float:
    """The largest absolute difference relative to the largest expected entry."""
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max())


def without_curvature(factors: KroneckerFactors) -> KroneckerFactors:
    """The same factors with zero eigenvalues, so that the posterior equals the prior."""
    layers = tuple(replace(layer, a_eigenvalues=torch.zeros_like(layer.a_eigenvalues)) for layer in factors.layers)
    return replace(factors, layers=layers)


def _fitted(work: Workload) -> LaplacePosterior:
    return LaplacePosterior(work.collect([work.batch], fisher="exact"))
