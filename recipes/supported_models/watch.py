"""Record the products of a model's code with the second weights of its experts.

A `TorchFunctionMode` intercepts every matrix product. If the storage of an operand is that of a second weight, inputs
and outputs are recorded; the operand's offset in the storage gives the expert.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from bmoe_lightning.experts import ExpertLayer, down_proj_parameters

# Positional arguments, and the role of each: `left @ right + bias`.
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
# Some models multiply in another dtype than that of their weights: a converted copy is treated as the weight.
_CONVERSIONS = frozenset({"float", "double", "half", "bfloat16", "to", "type"})
_NOT_FOLLOWED = frozenset({"einsum", "tensordot", "mv", "addmv", "chain_matmul", "multi_dot", "grouped_mm", "bilinear"})


class OracleError(RuntimeError):
    """The model uses a second weight in a way that the oracle does not support."""


@dataclass(frozen=True)
class SecondWeights:
    """The parameters that hold the second weights of one expert layer.

    Attributes:
        name: Name of the expert layer.
        parameters: One parameter with the weights of all experts in order, or one `[d_out, d_in]` for each expert.
        num_experts: Number of experts, E.
        d_in: Width of the input.
        d_out: Width of the output.
        transposed: Whether the single parameter holds `[d_in, d_out]` for each expert.
    """

    name: str
    parameters: tuple[Tensor, ...]
    num_experts: int
    d_in: int
    d_out: int
    transposed: bool

    def by_expert(self, gradients: Sequence[Tensor]) -> Tensor:
        """Gradients with the shapes of the parameters, as `[E, d_out, d_in]`."""
        if self.transposed:
            return gradients[0].reshape(self.num_experts, self.d_in, self.d_out).mT
        return torch.cat([g.reshape(-1, self.d_out, self.d_in) for g in gradients])


def down_proj_weights(model: nn.Module, layer: ExpertLayer) -> SecondWeights:
    """Look up the second weights of a layer.

    Raises:
        OracleError: If their number or sizes do not match the layer.
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
    """Check that no two layers share weights: their slots would have to be added up as those of one layer.

    Raises:
        OracleError: If two layers share a weight; the message names them.
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
    """Storage of second weights: parameter `index` of the layer at `position`, or a copy of it from `start`."""

    tensor: Tensor
    position: int
    index: int
    start: int


class Watch(TorchFunctionMode):
    """Records every product that torch computes with a second weight in its context.

    Args:
        weights: Second weights of the layers to watch.

    Attributes:
        products: Products of each layer.

    Raises:
        OracleError: If an operation uses a second weight in a way that is not supported.
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
        """The second weight whose storage contains a tensor."""
        if not isinstance(tensor, Tensor):
            return None
        try:
            address = tensor.untyped_storage().data_ptr()
        except NotImplementedError:  # inside torch.vmap, which creates masks
            return None
        for region in self._regions.get(address, ()):
            if 0 <= tensor.storage_offset() - region.tensor.storage_offset() < region.tensor.numel():
                return region
        return None

    def _converted(self, source: Any, result: Any) -> Any:
        """Register a copy of a second weight in another dtype."""
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
        """Compute `inputs @ matrix` (`[d_in, d_out]` or `[n, d_in, d_out]`), and record it if it has a graph."""
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
        # The model continues with a copy, so that its in-place operations do not change the recorded output.
        return outputs.clone()

    def _experts(self, matrix: Tensor, region: _Region) -> Tensor:
        """The expert of a matrix, or the experts of a stack of matrices."""
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
                f"{layer.name!r} multiplies with a slice of its second weights that is no expert's: shape "
                f"{tuple(matrix.shape)}, strides {matrix.stride()}; expected {(layer.d_in, layer.d_out)} and {strides}"
            )
        first = region.index + offset // size
        count = matrix.shape[0] if matrix.dim() == 3 else 1
        experts = first + torch.arange(count) * (step // size)
        return experts if matrix.dim() == 3 else experts.squeeze(0)
