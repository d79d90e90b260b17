"""Watch a model's own code multiply with the second weights of its experts.

Every matrix product is seen by a `TorchFunctionMode`. Where one operand lies in the memory of a second weight, what
goes in and what comes out is recorded; which expert it was follows from the operand's place in that memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from bmoe_lightning.experts import ExpertLayer, down_proj_parameters

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
# Some models multiply in another precision than that of their weights: the copy stands for the weight.
_CONVERSIONS = frozenset({"float", "double", "half", "bfloat16", "to", "type"})
_NOT_FOLLOWED = frozenset({"einsum", "tensordot", "mv", "addmv", "chain_matmul", "multi_dot", "grouped_mm", "bilinear"})


class OracleError(RuntimeError):
    """The model does with a second weight what the oracle cannot follow."""


@dataclass(frozen=True)
class SecondWeights:
    """Where the second weights of one expert layer lie.

    Attributes:
        name: Name of the expert layer.
        parameters: One parameter that holds all experts one after the other, or one `[d_out, d_in]` an expert.
        num_experts: Number of experts, E.
        d_in: Width of the input.
        d_out: Width of the output.
        transposed: Whether the one parameter holds `[d_in, d_out]` an expert.
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


def down_proj_weights(model: nn.Module, layer: ExpertLayer) -> SecondWeights:
    """Look a layer's second weights up.

    Raises:
        OracleError: If their number or sizes are not what the layer says.
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


def check_disjoint(weights: Sequence[SecondWeights]) -> None:
    """Refuse layers that hold the same weights: their slots would have to be added up as one layer's.

    Raises:
        OracleError: If there are two such layers, with their names.
    """
    owners: dict[int, str] = {}
    for layer in weights:
        for parameter in layer.parameters:
            owner = owners.setdefault(id(parameter), layer.name)
            if owner != layer.name:
                raise OracleError(f"{owner!r} and {layer.name!r} share a second weight: they are one layer, not two")


@dataclass(frozen=True)
class Product:
    """One matrix product with second weights.

    Attributes:
        experts: Expert of each row, `[n]` int64.
        inputs: Inputs `[n, d_in]`, without graph.
        outputs: Outputs `[..., d_out]`, n rows in the same order, before the bias, in the graph.
    """

    experts: Tensor
    inputs: Tensor
    outputs: Tensor


@dataclass(frozen=True)
class _Region:
    """Memory that holds second weights: parameter `index` of the layer at `position`, or a copy from `start` on."""

    tensor: Tensor
    position: int
    index: int
    start: int


class Watch(TorchFunctionMode):
    """While entered, records every product that torch computes with a second weight.

    Args:
        weights: Second weights of the layers to watch.

    Attributes:
        products: Products of each layer.

    Raises:
        OracleError: From an operation that uses a second weight in a way that is not followed.
    """

    def __init__(self, weights: Sequence[SecondWeights]) -> None:
        super().__init__()
        self.products: list[list[Product]] = [[] for _ in weights]
        self._weights = weights
        self._regions: dict[int, list[_Region]] = {}
        for position, layer in enumerate(weights):
            for index, parameter in enumerate(layer.parameters):
                self._add_region(parameter, position, index, 0)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in _NOT_FOLLOWED:
            self._refuse(name, args)
        elif name in _CONVERSIONS:
            return self._converted(args[0], func(*args, **kwargs))
        elif name in _OPERANDS:
            roles = _OPERANDS[name]
            operands = dict(zip(roles.values(), args, strict=False))
            operands.update({roles.get(key, key): value for key, value in kwargs.items()})
            for side in ("right", "left"):
                region = self._region(operands[side])
                if region is not None:
                    return self._multiply(name, operands, region, weight=side)
        return func(*args, **kwargs)

    def _add_region(self, tensor: Tensor, position: int, index: int, start: int) -> None:
        regions = self._regions.setdefault(tensor.untyped_storage().data_ptr(), [])
        regions.append(_Region(tensor, position, index, start))

    def _region(self, tensor: Any) -> _Region | None:
        """The second weight whose memory a tensor lies in."""
        if not isinstance(tensor, Tensor):
            return None
        try:
            address = tensor.untyped_storage().data_ptr()
        except NotImplementedError:  # inside torch.vmap, where masks are made
            return None
        for region in self._regions.get(address, ()):
            if 0 <= tensor.storage_offset() - region.tensor.storage_offset() < region.tensor.numel():
                return region
        return None

    def _converted(self, source: Any, result: Any) -> Any:
        """Know a copy of a second weight in another dtype for what it is."""
        region = self._region(source)
        if region is not None and isinstance(result, Tensor) and self._region(result) is None:
            if result.stride() != source.stride():
                self._refuse("a copy of another layout", [source])
            start = region.start + source.storage_offset() - region.tensor.storage_offset()
            self._add_region(result, region.position, region.index, start)
        return result

    def _refuse(self, use: str, arguments: Sequence[Any]) -> None:
        for argument in arguments:
            region = self._region(argument)
            if region is not None:
                raise OracleError(f"{self._weights[region.position].name!r} uses its second weights in {use}")

    def _multiply(self, name: str, operands: Mapping[str, Any], region: _Region, *, weight: str) -> Tensor:
        unknown = sorted(set(operands) - {"left", "right", "bias"})
        if unknown:
            self._refuse(f"{name} with {unknown}", [operands[weight]])
        left, right, bias = operands["left"], operands["right"], operands.get("bias")
        if name == "linear":
            right = right.mT
        product = self._keep(left, right, region) if weight == "right" else self._keep(right.mT, left.mT, region).mT
        return product if bias is None else product + bias

    def _keep(self, inputs: Tensor, matrix: Tensor, region: _Region) -> Tensor:
        """Compute `inputs @ matrix`, `matrix [d_in, d_out]` or `[n, d_in, d_out]`, and keep it if it has a graph."""
        experts = self._experts(matrix, region)
        outputs = inputs @ matrix
        if outputs.requires_grad:
            rows = experts.view(-1, *[1] * (matrix.dim() - 2)) if matrix.dim() > 2 else experts
            self.products[region.position].append(
                Product(
                    rows.expand(outputs.shape[:-1]).reshape(-1),
                    inputs.detach().expand(*outputs.shape[:-1], inputs.shape[-1]).reshape(-1, inputs.shape[-1]).clone(),
                    outputs,
                )
            )
        # A copy goes on, so that what the model does in place is done to the copy.
        return outputs.clone()

    def _experts(self, matrix: Tensor, region: _Region) -> Tensor:
        """Which expert's a matrix is, or one expert for each of a stack."""
        layer = self._weights[region.position]
        size = layer.d_in * layer.d_out
        strides = (layer.d_out, 1) if layer.transposed else (1, layer.d_in)
        offset = region.start + matrix.storage_offset() - region.tensor.storage_offset()
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
        first = region.index + offset // size
        count = matrix.shape[0] if matrix.dim() == 3 else 1
        experts = first + torch.arange(count) * (step // size)
        return experts if matrix.dim() == 3 else experts.squeeze(0)
