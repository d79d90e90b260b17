"""Other libraries on the same work, on models that are small enough for them."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu
from torch.utils.data import DataLoader, TensorDataset

from bmoe_lightning import LaplacePosterior
from bmoe_lightning.curvature import KroneckerFactors
from bmoe_lightning.experts import down_proj_parameters, find_expert_layers
from recipes.benchmark.measure import Peer, Section, in_turn, peak_megabytes
from recipes.benchmark.workload import Shape, Workload

Task = Callable[[], Any]

SAME = 1e-4
"""Relative difference up to which two float32 results count as equal."""


def measure_peers(shape: Shape, repeats: int, device: torch.device, say: Callable[[str], None]) -> Section:
    """Time every peer interleaved with this library; the error of a peer that fails is in its row."""
    rows: list[Peer] = []
    say("peers: torch.func.jacrev")
    fused = Workload(shape, device)
    posterior = LaplacePosterior(without_curvature(fused.collect([fused.batch])))
    class_logits = fused.class_logits()
    compare = partial(compared, repeats=repeats, device=device)
    rows.append(
        compare(
            "torch.func.jacrev",
            "logit covariance of a batch under the prior",
            lambda: partial(covariance_by_jacobian, fused),
            lambda: posterior.logit_covariance(fused.model, class_logits, fused.batch)[1],
            known=fused.tensors(),
            same_answer=True,
        )
    )
    separate = Workload(shape, device)
    separate_experts(separate.model)
    separate.layers = find_expert_layers(separate.model)
    known = separate.tensors()
    say("peers: curvlinops")
    rows.append(
        compare(
            "curvlinops",
            "K-FAC of a batch (mc); theirs full factors, not decomposed",
            lambda: curvlinops_factors(separate),
            lambda: separate.collect([separate.batch]),
            known=known,
        )
    )
    say("peers: laplace-torch")
    rows.append(
        compare(
            "laplace-torch",
            "K-FAC posterior of a batch (exact Fisher) and prediction of it",
            lambda: laplace_torch_prediction(separate),
            lambda: _fitted(separate).predict(separate.model, separate.class_logits(), separate.batch),
            known=known,
        )
    )
    return Section(
        "peers",
        "Beside peers",
        (
            f"{shape}. torch.func.jacrev on the fused model; the other two on the same weights as nn.Linear experts in "
            "an nn.ModuleList. Memory is the peak beyond model and batch.",
        ),
        peers=tuple(rows),
    )


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
    """
    known = [] if known is None else known
    answer = ours()
    our_memory = peak_megabytes(ours, device, known)
    try:
        theirs = make_peer()
        difference = relative_difference(theirs(), answer) if same_answer else None
        memory = peak_megabytes(theirs, device, known)
        times = in_turn({"theirs": theirs, "ours": ours}, repeats, device)
    except Exception as error:  # noqa: BLE001  (any exception of a peer is its result)
        alone = in_turn({"ours": ours}, repeats, device)["ours"]
        return Peer(name, work, (), alone, None, our_memory, None, f"{type(error).__name__}: {error}")
    return Peer(name, work, times["theirs"], times["ours"], memory, our_memory, difference, None)


def relative_difference(found: Tensor, expected: Tensor) -> float:
    """The largest absolute difference relative to the largest expected entry."""
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max())


def without_curvature(factors: KroneckerFactors) -> KroneckerFactors:
    """The same factors with zero eigenvalues, so that the posterior equals the prior."""
    layers = tuple(replace(layer, a_eigenvalues=torch.zeros_like(layer.a_eigenvalues)) for layer in factors.layers)
    return replace(factors, layers=layers)


class _Logits(nn.Module):
    """A module from token ids to class logits, as peers expect."""

    def __init__(self, work: Workload) -> None:
        super().__init__()
        self.model = work.model
        self._class_logits = work.class_logits()

    def forward(self, ids: Tensor) -> Tensor:
        return self._class_logits(self.model, {"ids": ids, "labels": None})[0]


def covariance_by_jacobian(work: Workload) -> Tensor:
    """`J J^T` over all second weights from the materialised Jacobian: `[B, K, K]` at a prior precision of 1."""
    weights = {
        f"model.{name}": parameter.detach()
        for layer in work.layers
        for name, parameter in down_proj_parameters(work.model, layer).items()
    }
    logits = _Logits(work)
    jacobian = torch.func.jacrev(lambda w: torch.func.functional_call(logits, w, (work.batch["ids"],)))(weights)
    # Expert by expert: a single product over all weights loses four digits in float32.
    by_expert = [part.flatten(2) for layer in jacobian.values() for part in layer.unbind(2)]
    return sum((part @ part.mT for part in by_expert), torch.zeros(()))


def _import_peer(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"{error}; install it with: pip install 'bmoe-lightning[bench]'") from error


def _second_weights(work: Workload) -> list[nn.Parameter]:
    chosen = [p for layer in work.layers for p in down_proj_parameters(work.model, layer).values()]
    for parameter in chosen:
        parameter.requires_grad_(True)
    return chosen


def curvlinops_factors(work: Workload) -> Task:
    """The Kronecker factors of all second weights with curvlinops (https://github.com/f-dangel/curvlinops)."""
    curvlinops = _import_peer("curvlinops")
    weights, ids, labels = _second_weights(work), work.batch["ids"], work.batch["labels"]

    def factors() -> None:
        operator = curvlinops.KFACLinearOperator(
            _Logits(work),
            nn.CrossEntropyLoss(),
            weights,
            [(ids, labels)],
            fisher_type="mc",
            check_deterministic=False,
            num_per_example_loss_terms=1,
            num_data=len(ids),
        )
        operator.compute_kronecker_factors()

    return factors


def laplace_torch_prediction(work: Workload) -> Task:
    """The fit of laplace-torch's Kronecker posterior (https://github.com/aleximmer/Laplace) and its prediction."""
    laplace = _import_peer("laplace")
    _second_weights(work)
    ids = work.batch["ids"]
    loader = DataLoader(TensorDataset(ids, work.batch["labels"]), batch_size=len(ids))

    def fit_and_predict() -> None:
        posterior = laplace.KronLaplace(_Logits(work), "classification")
        posterior.fit(loader)
        posterior(ids, pred_type="glm", link_approx="mc", n_samples=1000)

    return fit_and_predict


def _fitted(work: Workload) -> LaplacePosterior:
    return LaplacePosterior(work.collect([work.batch], fisher="exact"))


class _Expert(nn.Module):
    """One expert of linear layers, with the weights of a fused one."""

    def __init__(self, gate_up: Tensor, down: Tensor) -> None:
        super().__init__()
        gate, up = gate_up.chunk(2)
        self.gate, self.up, self.down = _linear(gate), _linear(up), _linear(down)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(silu(self.gate(x)) * self.up(x))


def _linear(weight: Tensor) -> nn.Linear:
    d_out, d_in = weight.shape
    linear = nn.Linear(d_in, d_out, bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


class _Experts(nn.ModuleList):
    """All experts, called one by one on the tokens routed to them."""

    def forward(self, tokens: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        total = torch.zeros_like(tokens)
        for number, expert in enumerate(self):
            rows, choice = torch.where(index == number)
            total = total.index_add(0, rows, expert(tokens[rows]) * weights[rows, choice].unsqueeze(1))
        return total


def separate_experts(model: Any) -> None:
    """Replace the fused experts of a Qwen2-MoE model by the same ones as `nn.Linear`s in an `nn.ModuleList`."""
    for block in model.model.layers:
        fused = block.mlp.experts
        block.mlp.experts = _Experts(map(_Expert, fused.gate_up_proj.detach(), fused.down_proj.detach()))
