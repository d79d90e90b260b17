"""The same computations with other libraries."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from bmoe_lightning.experts import down_proj_parameters
from recipes.benchmark.workload import Workload

FullFactors = dict[str, tuple[Tensor, Tensor]]
"""Full factors, `[d_in, d_in]` and `[d_out, d_out]`, by the name of an expert's layer."""


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
        raise ImportError(f"{error}; `make peers` installs it (see the comment of the extra `bench`)") from error


def _second_weights(work: Workload) -> list[nn.Parameter]:
    chosen = [p for layer in work.layers for p in down_proj_parameters(work.model, layer).values()]
    for parameter in chosen:
        parameter.requires_grad_(True)
    return chosen


def curvlinops_factors(work: Workload) -> Callable[..., FullFactors]:
    """K-FAC of all second weights with curvlinops (https://github.com/f-dangel/curvlinops).

    Returns:
        Function of batches (and `fisher`, `mc` by default) to the full factors of every expert.
    """
    curvlinops = _import_peer("curvlinops")
    weights = _second_weights(work)
    model = _Logits(work)

    def factors(batches: Iterable[Any], fisher: str = "mc") -> FullFactors:
        for weight in weights:
            weight.requires_grad_(True)
        operator = curvlinops.KFACLinearOperator(
            model,
            nn.CrossEntropyLoss(),
            weights,
            _Pairs(batches),
            fisher_type=fisher,
            check_deterministic=False,
            num_per_example_loss_terms=1,
            num_data=len(work.batch["ids"]),
        )
        try:
            operator.compute_kronecker_factors()
        finally:
            for weight in weights:
                weight.requires_grad_(False)
        inputs, gradients = operator._input_covariances, operator._gradient_covariances
        return {name: (inputs[name], gradients[name]) for name in inputs}

    return factors


class _Pairs:
    """Batches as pairs of token ids and labels."""

    def __init__(self, batches: Iterable[Any]) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return ((batch["ids"], batch["labels"]) for batch in self._batches)


def decomposed(factors: FullFactors, rank: int) -> list[tuple[Tensor, Tensor]]:
    """The leading eigenpairs of full factors, as a low-rank posterior needs them: eigenvalues `[r]`, basis `[d, r]`."""
    pairs = []
    for factor in itertools.chain.from_iterable(factors.values()):
        values, vectors = torch.linalg.eigh(factor)
        pairs.append((values[-rank:], vectors[:, -rank:]))
    return pairs


def laplace_torch_prediction(work: Workload) -> Callable[[], None]:
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
