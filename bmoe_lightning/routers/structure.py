"""Which module near the experts is their router, by the shapes of its linear maps."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from bmoe_lightning.experts.wrappers.linear import linear_shape
from bmoe_lightning.experts.wrappers.names import unwrapped
from bmoe_lightning.experts.wrappers.quantised import is_linear

Shape = tuple[int, int]


def is_plain_linear(module: nn.Module) -> bool:
    """Whether a module, with its wrappers, is called on tokens and returns their linear map, and nothing else."""
    inner = unwrapped(module)
    return is_linear(module) and (not isinstance(inner, nn.Linear) or type(inner).forward is nn.Linear.forward)


def plain_linears(module: nn.Module) -> Iterator[nn.Module]:
    """The plain linear layers below a module, each with its outermost wrapper; not the module itself."""
    for child in module.children():
        if is_plain_linear(child):
            yield child
        else:
            yield from plain_linears(child)


def linear_maps(module: nn.Module) -> set[Shape]:
    """The shapes `(d_out, d_in)` of the linear layers and matrices in a module, without those of adapters."""
    if is_linear(module):
        return {linear_shape(module)}
    inner = unwrapped(module)
    if isinstance(inner, nn.Embedding):
        return set()
    found = {(p.shape[0], p.shape[1]) for p in inner.parameters(recurse=False) if p.dim() == 2}
    return found.union(*map(linear_maps, inner.children()))


def router_shape(module: nn.Module, num_experts: int, *, more: bool) -> list[Shape]:
    """The shapes `(N, D)` of linear maps in a module that may give the logits of some experts.

    Args:
        module: The module.
        num_experts: Number of experts.
        more: Whether N is larger than that: with logits for experts that do nothing, or that are shared.
    """
    maps = sorted(linear_maps(module))
    if not more:
        return [shape for shape in maps if shape[0] == num_experts]
    larger = [shape for shape in maps if num_experts < shape[0] <= 2 * num_experts]
    return [shape for shape in larger if shape[0] == larger[0][0]]
