"""Dense curvature and covariance of any model's experts, from the model's code alone.

The model runs its unmodified implementation under a `Watch`, which records the inputs and outputs of every second
weight. The library's forward, taps and algebra are not used, so that this is an independent reference for them. All
matrices are dense and in float64: for small models only.

Shapes: `B` examples, `K` classes, `E` experts, `S` slots of one layer; a weight is `[d_out, d_in]` and its flattened
form has the curvature `kron(G, A)`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from recipes.supported_models.watch import OracleError, SecondWeights, Watch, check_disjoint

ClassLogits = Callable[[Any, Any], tuple[Tensor, Tensor | None]]

# Slots and weight gradients give the same Jacobian; they agree even for models that compute partly in float32, since
# both come from one backward pass.
_AGREEMENT = 1e-5


@dataclass(frozen=True)
class ObservedSlots:
    """The slots of one layer in one batch.

    Attributes:
        experts: Expert of each slot, `[S]` int64.
        inputs: Inputs `[S, d_in]` float64.
        gradients: Gradients of each logit of each example with respect to the slots' outputs, `[B, K, S, d_out]`
            float64.
    """

    experts: Tensor
    inputs: Tensor
    gradients: Tensor

    @property
    def counted(self) -> Tensor:
        """`[S]` bool: slots whose weight gradient is not exactly zero."""
        return self.inputs.ne(0).any(1) & self.gradients.ne(0).any(3).flatten(0, 1).any(0)

    def weight_jacobian(self, num_experts: int) -> Tensor:
        """Jacobian of the logits with respect to every expert's weight, from the slots: `[B, K, E, d_out, d_in]`."""
        hits = nn.functional.one_hot(self.experts, num_experts).to(self.inputs)
        return torch.einsum("nkso,se,si->nkeoi", self.gradients, hits, self.inputs)


@dataclass(frozen=True)
class Observation:
    """Logits, slots and Jacobians of one batch.

    Attributes:
        logits: Logits `[B, K]` float64, without graph.
        slots: Slots of each layer.
        jacobians: Jacobian of each layer, `[B, K, E, d_out, d_in]` float64, by automatic differentiation with respect
            to the parameters.
    """

    logits: Tensor
    slots: tuple[ObservedSlots, ...]
    jacobians: tuple[Tensor, ...]


@dataclass(frozen=True)
class DenseFactors:
    """The exact-Fisher K-FAC factors of one layer, expand form: `F_e = n_e (G_e kron A_e)`.

    Attributes:
        slots: Numbers of slots n_e, `[E]` float64.
        a: Mean of `a a^T`, `[E, d_in, d_in]` float64.
        g: Mean of `E_y[delta delta^T]`, `[E, d_out, d_out]` float64.
    """

    slots: Tensor
    a: Tensor
    g: Tensor

    def block(self, expert: int) -> Tensor:
        """F_e: `[d_out d_in, d_out d_in]`."""
        return self.slots[expert] * torch.kron(self.g[expert], self.a[expert])


def observe(model: nn.Module, class_logits: ClassLogits, batch: Any, weights: Sequence[SecondWeights]) -> Observation:
    """Run a batch through the model's code and differentiate every logit.

    Args:
        model: Model in evaluation mode; `requires_grad` and `.grad` of its parameters are restored.
        class_logits: Function `(model, batch) -> (logits [B, K], labels [B] or None)`; `-inf` marks an absent class.
        batch: Batch that `class_logits` takes.
        weights: Second weights of the layers to watch.

    Raises:
        OracleError: If two layers share a weight, or a second weight is used in a way that is not supported.
    """
    check_disjoint(weights)
    watch = Watch(weights)
    with _differentiable(weights), torch.enable_grad():
        with watch:
            logits, _ = class_logits(model, batch)
        return _differentiated(watch, logits, weights)


def weighted_jacobians(
    model: nn.Module, class_logits: ClassLogits, batch: Any, weights: Sequence[SecondWeights], logit_weights: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """Differentiate a weighted sum of logits with respect to the second weights, with any experts implementation.

    Args:
        model: Model in evaluation mode.
        class_logits: Function `(model, batch) -> (logits [B, K], labels [B] or None)`.
        batch: Batch that `class_logits` takes.
        weights: Second weights of the layers.
        logit_weights: Weights of the logits, `[B, K]`.

    Returns:
        Logits `[B, K]` float64 without graph, and `[E, d_out, d_in]` float64 for each layer.
    """
    with _differentiable(weights), torch.enable_grad():
        logits, _ = class_logits(model, batch)
        total = (_finite(logits) * logit_weights.to(logits)).sum()
        return logits.detach().double(), _gradients(total, weights)


def dense_factors(observations: Sequence[Observation], weights: Sequence[SecondWeights]) -> list[DenseFactors]:
    """K-FAC factors (expand form, https://arxiv.org/abs/2311.00636) by definition, in a loop over experts and slots.

    A slot counts when its weight gradient is not exactly zero.
    """
    return [_layer_factors(observations, position, layer) for position, layer in enumerate(weights)]


def dense_logit_covariance(
    jacobians: Sequence[Tensor], factors: Sequence[DenseFactors], prior_precision: float
) -> Tensor:
    """`sum_{l,e} J_e (F_e + lambda I)^-1 J_e^T`: `[B, K, K]` float64.

    Args:
        jacobians: Jacobian of each layer, `[B, K, E, d_out, d_in]`.
        factors: Factors of each layer.
        prior_precision: Prior precision lambda.
    """
    total = torch.zeros(())
    for jacobian, layer in zip(jacobians, factors, strict=True):
        for expert in range(len(layer.slots)):
            block = layer.block(expert)
            block.diagonal().add_(prior_precision)
            rows = jacobian[:, :, expert].flatten(2)  # [B, K, D]
            solved = torch.linalg.solve(block, rows.flatten(0, 1).T).T.view_as(rows)
            total = total + rows @ solved.mT
    return total


def _finite(logits: Tensor) -> Tensor:
    return torch.where(logits == -torch.inf, 0, logits)


@contextmanager
def _differentiable(weights: Sequence[SecondWeights]) -> Iterator[None]:
    frozen = [p for layer in weights for p in layer.parameters if not p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def _gradients(scalar: Tensor, weights: Sequence[SecondWeights]) -> list[Tensor]:
    parameters = [parameter for layer in weights for parameter in layer.parameters]
    found = iter(_grad(scalar, parameters))
    return [layer.by_expert([next(found) for _ in layer.parameters]).double() for layer in weights]


def _grad(scalar: Tensor, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
    return torch.autograd.grad(scalar, inputs, retain_graph=True, materialize_grads=True) if inputs else ()


def _differentiated(watch: Watch, logits: Tensor, weights: Sequence[SecondWeights]) -> Observation:
    outputs = [product.outputs for products in watch.products for product in products]
    jacobians: list[list[Tensor]] = [[] for _ in weights]
    gradients: list[list[Tensor]] = [[] for _ in weights]
    for logit in _finite(logits).flatten():
        for position, jacobian in enumerate(_gradients(logit, weights)):
            jacobians[position].append(jacobian)
        found = iter(_grad(logit, outputs))
        for position, layer in enumerate(weights):
            parts = [next(found).reshape(-1, layer.d_out) for _ in watch.products[position]]
            gradients[position].append(_joined(parts, layer.d_out))
    slots = tuple(
        ObservedSlots(
            torch.cat([torch.empty(0, dtype=torch.int64), *(product.experts for product in products)]),
            _joined([product.inputs for product in products], layer.d_in),
            torch.stack(gradients[position]).unflatten(0, logits.shape),
        )
        for position, (layer, products) in enumerate(zip(weights, watch.products, strict=True))
    )
    stacked = tuple(torch.stack(jacobian).unflatten(0, logits.shape) for jacobian in jacobians)
    for layer, seen, jacobian in zip(weights, slots, stacked, strict=True):
        missed = torch.linalg.vector_norm(seen.weight_jacobian(layer.num_experts) - jacobian)
        if missed > _AGREEMENT * torch.linalg.vector_norm(jacobian):
            raise OracleError(
                f"the recorded products with the second weights of {layer.name!r} do not add up to their gradients; "
                "the model uses these weights in another way as well"
            )
    return Observation(logits.detach().double(), slots, stacked)


def _joined(rows: Sequence[Tensor], width: int) -> Tensor:
    """One float64 matrix of all rows; empty for a layer that no token of the batch reached."""
    return torch.cat([torch.empty(0, width, dtype=torch.float64), *(part.double() for part in rows)])


def _layer_factors(observations: Sequence[Observation], position: int, layer: SecondWeights) -> DenseFactors:
    slots = torch.zeros(layer.num_experts, dtype=torch.float64)
    a = torch.zeros(layer.num_experts, layer.d_in, layer.d_in, dtype=torch.float64)
    g = torch.zeros(layer.num_experts, layer.d_out, layer.d_out, dtype=torch.float64)
    for observation in observations:
        seen = observation.slots[position]
        p = observation.logits.softmax(-1)
        fisher = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
        for slot in seen.counted.nonzero().flatten().tolist():
            expert = int(seen.experts[slot])
            gradient = seen.gradients[:, :, slot]  # [B, K, d_out]; zero except for the slot's example
            slots[expert] += 1
            a[expert] += torch.outer(seen.inputs[slot], seen.inputs[slot])
            g[expert] += (gradient.mT @ fisher @ gradient).sum(0)
    count = slots.clamp(min=1).view(-1, 1, 1)
    return DenseFactors(slots, a / count, g / count)
