"""Dense curvature and covariance of any model's experts, from the model's own code alone.

The model runs its own implementation while a `TorchFunctionMode` looks at every matrix product. Where one operand lies
in the memory of a second weight, what goes in and what comes out is kept, and which expert it was follows from the
operand's place in that memory. Nothing of the library's forward, taps or algebra takes part; that is what makes this a
reference for them. Everything is float64 and written out: for small models only.

Shapes: `B` examples, `K` classes, `E` experts, `S` slots of one layer; a weight is `[d_out, d_in]` and its flattened
form has the curvature `kron(G, A)`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from bmoe_lightning.experts import ExpertLayer, down_proj_parameters

ClassLogits = Callable[[Any, Any], tuple[Tensor, Tensor | None]]

# Slots and weight gradients are two ways to the same Jacobian; models that compute in float32 here and there still
# give the same numbers both ways, since the backward pass is one.
_AGREEMENT = 1e-6

# Arguments in their order, and what each is: `left @ right + bias`.
_MATMUL = {"input": "left", "other": "right"}
_MM = {"input": "left", "mat2": "right"}
_OPERANDS = {
    "linear": {"input": "left", "weight": "right", "bias": "bias"},
    "matmul": _MATMUL,
    "__matmul__": _MATMUL,
    "__rmatmul__": {"self": "right", "other": "left"},
    "mm": _MM,
    "bmm": _MM,
    "addmm": {"input": "bias", "mat1": "left", "mat2": "right"},
    "baddbmm": {"input": "bias", "batch1": "left", "batch2": "right"},
}
_NOT_FOLLOWED = frozenset({"einsum", "tensordot", "mv", "addmv", "chain_matmul", "multi_dot", "grouped_mm", "bilinear"})


class OracleError(RuntimeError):
    """The model does with a second weight what the oracle cannot follow."""


@dataclass(frozen=True)
class SecondWeights:
    """Where the second weights of one expert layer lie.

    Attributes:
        name: of the expert layer.
        parameters: one that holds all experts one after the other, or one `[d_out, d_in]` an expert.
        num_experts: E.
        d_in: width of what enters.
        d_out: width of what comes out.
        transposed: whether the one parameter holds `[d_in, d_out]` an expert.
    """

    name: str
    parameters: tuple[Tensor, ...]
    num_experts: int
    d_in: int
    d_out: int
    transposed: bool

    def by_expert(self, gradients: Sequence[Tensor]) -> Tensor:
        """Gradients of the parameters, in their own shapes, as `[E, d_out, d_in]`."""
        if self.transposed:
            return gradients[0].reshape(self.num_experts, self.d_in, self.d_out).mT
        return torch.cat([g.reshape(-1, self.d_out, self.d_in) for g in gradients])


def second_weights(model: nn.Module, layer: ExpertLayer) -> SecondWeights:
    """Look a layer's second weights up.

    Raises:
        OracleError: if their number or sizes are not what the layer says.
    """
    parameters = tuple(down_proj_parameters(model, layer).values())
    size = layer.d_in * layer.d_out
    sizes = [parameter.numel() for parameter in parameters]
    if sizes not in ([layer.num_experts * size], [size] * layer.num_experts):
        raise OracleError(
            f"{layer.name!r} should hold {layer.num_experts} weights of {layer.d_out} x {layer.d_in}, but its "
            f"{len(parameters)} parameters have {sizes} elements"
        )
    if not all(parameter.is_contiguous() for parameter in parameters):
        raise OracleError(f"a second weight of {layer.name!r} is not contiguous: its experts cannot be told apart")
    transposed = layer.transposed and len(parameters) == 1
    return SecondWeights(layer.name, parameters, layer.num_experts, layer.d_in, layer.d_out, transposed)


@dataclass(frozen=True)
class ObservedSlots:
    """The slots of one layer in one batch.

    Attributes:
        experts: `[S]` int64.
        inputs: `[S, d_in]` float64.
        gradients: `[B, K, S, d_out]` float64: of each logit of each example in the slot's output.
    """

    experts: Tensor
    inputs: Tensor
    gradients: Tensor

    @property
    def counted(self) -> Tensor:
        """`[S]` bool: slots whose weight gradient is not exactly zero."""
        return self.inputs.ne(0).any(1) & self.gradients.ne(0).any(3).flatten(0, 1).any(0)

    def weight_jacobian(self, num_experts: int) -> Tensor:
        """Derivative of every logit in every expert's weight, slot by slot: `[B, K, E, d_out, d_in]`."""
        hits = nn.functional.one_hot(self.experts, num_experts).to(self.inputs)
        return torch.einsum("nkso,se,si->nkeoi", self.gradients, hits, self.inputs)


@dataclass(frozen=True)
class Observation:
    """What one batch did.

    Attributes:
        logits: `[B, K]` float64, without graph.
        slots: of each layer.
        jacobians: of each layer, `[B, K, E, d_out, d_in]` float64, by automatic differentiation in the parameters.
    """

    logits: Tensor
    slots: tuple[ObservedSlots, ...]
    jacobians: tuple[Tensor, ...]


@dataclass(frozen=True)
class DenseFactors:
    """The exact-Fisher K-FAC factors of one layer, expand form: `F_e = n_e (G_e kron A_e)`.

    Attributes:
        slots: `[E]` float64, n_e.
        a: `[E, d_in, d_in]` float64, mean of `a a^T`.
        g: `[E, d_out, d_out]` float64, mean of `E_y[delta delta^T]`.
    """

    slots: Tensor
    a: Tensor
    g: Tensor

    def block(self, expert: int) -> Tensor:
        """F_e: `[d_out d_in, d_out d_in]`."""
        return self.slots[expert] * torch.kron(self.g[expert], self.a[expert])


def observe(model: nn.Module, class_logits: ClassLogits, batch: Any, weights: Sequence[SecondWeights]) -> Observation:
    """Run a batch through the model's own code and differentiate every logit.

    Args:
        model: in evaluation mode; its parameters' `requires_grad` and `.grad` are as before afterwards.
        class_logits: `(model, batch) -> (logits [B, K], labels [B] or None)`; `-inf` marks an absent class.
        batch: whatever `class_logits` takes.
        weights: of the layers to watch.

    Raises:
        OracleError: if a layer saw no token, or a second weight is used in a way that is not followed.
    """
    watch = _Watch(weights)
    with _differentiable(weights), torch.enable_grad():
        with watch:
            logits, _ = class_logits(model, batch)
        return _differentiated(watch, logits, weights)


def weighted_jacobians(
    model: nn.Module, class_logits: ClassLogits, batch: Any, weights: Sequence[SecondWeights], logit_weights: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """Differentiate a weighted sum of logits in the second weights, whatever implementation the model is set to.

    Args:
        model: in evaluation mode.
        class_logits: `(model, batch) -> (logits [B, K], labels [B] or None)`.
        batch: whatever `class_logits` takes.
        weights: of the layers.
        logit_weights: `[B, K]`.

    Returns:
        Logits `[B, K]` float64 without graph, and `[E, d_out, d_in]` float64 for each layer.
    """
    with _differentiable(weights), torch.enable_grad():
        logits, _ = class_logits(model, batch)
        total = (_finite(logits) * logit_weights.to(logits)).sum()
        return logits.detach().double(), _gradients(total, weights)


def dense_factors(observations: Sequence[Observation], weights: Sequence[SecondWeights]) -> list[DenseFactors]:
    """K-FAC factors by definition: one expert and one slot after the other.

    A slot counts when its weight gradient is not exactly zero.
    """
    return [_layer_factors(observations, position, layer) for position, layer in enumerate(weights)]


def dense_logit_covariance(
    jacobians: Sequence[Tensor], factors: Sequence[DenseFactors], prior_precision: float
) -> Tensor:
    """`sum_{l,e} J_e (F_e + lambda I)^-1 J_e^T`: `[B, K, K]` float64.

    Args:
        jacobians: of each layer, `[B, K, E, d_out, d_in]`.
        factors: of each layer.
        prior_precision: lambda.
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
    found = iter(torch.autograd.grad(scalar, parameters, retain_graph=True, materialize_grads=True))
    return [layer.by_expert([next(found) for _ in layer.parameters]).double() for layer in weights]


def _differentiated(watch: _Watch, logits: Tensor, weights: Sequence[SecondWeights]) -> Observation:
    for layer, products in zip(weights, watch.products, strict=True):
        if not products:
            raise OracleError(f"no matrix product with a second weight of {layer.name!r} was seen")
    outputs = [product.outputs for products in watch.products for product in products]
    jacobians: list[list[Tensor]] = [[] for _ in weights]
    gradients: list[list[Tensor]] = [[] for _ in weights]
    for logit in _finite(logits).flatten():
        for position, jacobian in enumerate(_gradients(logit, weights)):
            jacobians[position].append(jacobian)
        found = iter(torch.autograd.grad(logit, outputs, retain_graph=True, materialize_grads=True))
        for position, layer in enumerate(weights):
            parts = [next(found).reshape(-1, layer.d_out) for _ in watch.products[position]]
            gradients[position].append(torch.cat(parts).double())
    slots = tuple(
        ObservedSlots(
            torch.cat([product.experts for product in products]),
            torch.cat([product.inputs for product in products]).double(),
            torch.stack(gradients[position]).unflatten(0, logits.shape),
        )
        for position, products in enumerate(watch.products)
    )
    stacked = tuple(torch.stack(jacobian).unflatten(0, logits.shape) for jacobian in jacobians)
    for layer, seen, jacobian in zip(weights, slots, stacked, strict=True):
        missed = torch.linalg.vector_norm(seen.weight_jacobian(layer.num_experts) - jacobian)
        if missed > _AGREEMENT * torch.linalg.vector_norm(jacobian):
            raise OracleError(
                f"the products seen with the second weights of {layer.name!r} do not make up their gradients: the "
                "model uses these weights in another way as well"
            )
    return Observation(logits.detach().double(), slots, stacked)


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
            gradient = seen.gradients[:, :, slot]  # [B, K, d_out]; zero but for the examples that the slot serves
            slots[expert] += 1
            a[expert] += torch.outer(seen.inputs[slot], seen.inputs[slot])
            g[expert] += (gradient.mT @ fisher @ gradient).sum(0)
    count = slots.clamp(min=1).view(-1, 1, 1)
    return DenseFactors(slots, a / count, g / count)


@dataclass(frozen=True)
class _Product:
    """One matrix product: `experts [n]`, `inputs [n, d_in]` without graph, `outputs [..., d_out]` in the graph."""

    experts: Tensor
    inputs: Tensor
    outputs: Tensor


class _Watch(TorchFunctionMode):
    """Keeps every product with a second weight, in the order of the layers."""

    def __init__(self, weights: Sequence[SecondWeights]) -> None:
        super().__init__()
        self.products: list[list[_Product]] = [[] for _ in weights]
        self._weights = weights
        self._places: dict[int, list[tuple[int, int]]] = {}
        for position, layer in enumerate(weights):
            for index, parameter in enumerate(layer.parameters):
                self._places.setdefault(parameter.untyped_storage().data_ptr(), []).append((position, index))

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in _NOT_FOLLOWED:
            self._refuse(name, args)
        elif name in _OPERANDS:
            roles = _OPERANDS[name]
            operands = dict(zip(roles.values(), args, strict=False))
            operands.update({roles.get(key, key): value for key, value in kwargs.items()})
            for side in ("right", "left"):
                place = self._place(operands[side])
                if place is not None:
                    return self._multiply(name, operands, place, weight=side)
        return func(*args, **kwargs)

    def _place(self, tensor: Any) -> tuple[int, int] | None:
        """The layer and the parameter whose memory a tensor lies in."""
        if not isinstance(tensor, Tensor):
            return None
        for position, index in self._places.get(tensor.untyped_storage().data_ptr(), ()):
            parameter = self._weights[position].parameters[index]
            if 0 <= tensor.storage_offset() - parameter.storage_offset() < parameter.numel():
                return position, index
        return None

    def _refuse(self, name: str, arguments: Sequence[Any]) -> None:
        for argument in arguments:
            place = self._place(argument)
            if place is not None:
                raise OracleError(f"{self._weights[place[0]].name!r} uses its second weights in {name}()")

    def _multiply(self, name: str, operands: Mapping[str, Any], place: tuple[int, int], *, weight: str) -> Tensor:
        unknown = sorted(set(operands) - {"left", "right", "bias"})
        if unknown:
            raise OracleError(f"{self._weights[place[0]].name!r} uses its second weights in {name}() with {unknown}")
        left, right, bias = operands["left"], operands["right"], operands.get("bias")
        if name == "linear":
            right = right.mT
        product = self._keep(left, right, place) if weight == "right" else self._keep(right.mT, left.mT, place).mT
        return product if bias is None else product + bias

    def _keep(self, inputs: Tensor, matrix: Tensor, place: tuple[int, int]) -> Tensor:
        """Compute `inputs @ matrix`, `matrix [d_in, d_out]` or `[n, d_in, d_out]`, and keep it if it has a graph."""
        experts = self._experts(matrix, place)
        outputs = inputs @ matrix
        if outputs.requires_grad:
            rows = experts.view(-1, *[1] * (matrix.dim() - 2)) if matrix.dim() > 2 else experts
            self.products[place[0]].append(
                _Product(
                    rows.expand(outputs.shape[:-1]).reshape(-1),
                    inputs.detach().expand(*outputs.shape[:-1], inputs.shape[-1]).reshape(-1, inputs.shape[-1]).clone(),
                    outputs,
                )
            )
        # A copy goes on, so that what the model does in place is done to the copy.
        return outputs.clone()

    def _experts(self, matrix: Tensor, place: tuple[int, int]) -> Tensor:
        """Which expert's a matrix is, or one expert for each of a stack."""
        layer, index = self._weights[place[0]], place[1]
        size = layer.d_in * layer.d_out
        strides = (layer.d_out, 1) if layer.transposed else (1, layer.d_in)
        offset = matrix.storage_offset() - layer.parameters[index].storage_offset()
        step = matrix.stride(0) if matrix.dim() == 3 else 0
        if (
            matrix.shape[-2:] != (layer.d_in, layer.d_out)
            or matrix.stride()[-2:] != strides
            or matrix.dim() > 3
            or offset % size
            or step % size
        ):
            raise OracleError(
                f"{layer.name!r} multiplies with a part of its second weights that is no expert's: shape "
                f"{tuple(matrix.shape)}, strides {matrix.stride()}; expected {(layer.d_in, layer.d_out)} and {strides}"
            )
        first = index + offset // size
        count = matrix.shape[0] if matrix.dim() == 3 else 1
        experts = first + torch.arange(count) * (step // size)
        return experts if matrix.dim() == 3 else experts.squeeze(0)
