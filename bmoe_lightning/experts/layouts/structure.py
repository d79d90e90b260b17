"""Find experts by the shapes of their linear layers."""

from __future__ import annotations

from torch import nn

from bmoe_lightning.experts.types import ExpertLayer
from bmoe_lightning.experts.wrappers.linear import has_linears, linear_shape, linears_of
from bmoe_lightning.experts.wrappers.names import plain_name

_SHARED = ("shared_expert", "shared_mlp")
_USUAL_NAMES = ("down_proj", "w2", "fc2", "wo", "c_proj", "output_linear", "dense_4h_to_h")


def experts_of(module: nn.Module) -> dict[str, nn.Module]:
    """The experts in a list or dictionary of modules, by name: all children with linear layers (not a dropout, say)."""
    if not isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        return {}
    return {name: child for name, child in module.named_children() if has_linears(child)}


def down_proj_name(
    name: str, experts: nn.Module, parent: nn.Module, down_proj: str | None, *, named: bool
) -> str | None:
    """The name of the second linear layer (`down_proj`) in every expert of a list; None if it holds no experts.

    Args:
        name: Qualified name of the list.
        experts: The list.
        parent: The module that holds the list and the router.
        down_proj: Name of the layer, if the user gave it.
        named: Whether the user's pattern matches the list, so that it must hold experts.

    Raises:
        ValueError: If the shapes are ambiguous, or `down_proj` does not exist in a list that was named.
    """
    widths = _router_widths(parent, experts)
    if not named and not widths:
        return None
    shapes = [_shapes(expert) for expert in experts_of(experts).values()]
    if len(shapes) < 2 or any(shape != shapes[0] for shape in shapes[1:]):
        return None
    linears = shapes[0]
    if down_proj is not None:
        if down_proj in linears:
            return down_proj
        if named:
            raise ValueError(f"experts of {name!r} have no linear layer {down_proj!r}; they have {sorted(linears)}")
        return None
    if not 2 <= len(linears) <= 3:
        return None
    if isinstance(next(iter(experts_of(experts).values())), nn.Sequential):
        return list(linears)[-1]
    candidates = [
        n
        for n, (d_out, d_in) in linears.items()
        # Gate and up projection may be one layer.
        if all(shape in ((d_in, d_out), (2 * d_in, d_out)) for other, shape in linears.items() if other != n)
    ]
    if len(candidates) > 1:
        # Of two layers each maps back to the other's input width; the router has the model's width.
        back = [n for n in candidates if linears[n][0] in widths and linears[n][1] not in widths]
        if len(back) != 1:
            raise ValueError(
                f"the shapes of the linear layers of the experts in {name!r} do not tell which one is down_proj (the "
                f"second linear layer); name it with down_proj=, one of {sorted(linears)}"
            )
        return back[0]
    return candidates[0] if candidates else None


def shared_experts_near(layer: ExpertLayer, modules: dict[str, nn.Module], *, may_hold_block: bool) -> list[str]:
    """The `down_proj` layers of the shared experts that belong to an expert layer.

    A shared expert is a module with `shared_expert` or `shared_mlp` in its name, a sibling of the routed experts or of
    the block that holds them, with linear layers of which one maps back to the model's width.

    Args:
        layer: A layer of routed experts.
        modules: All modules of the model by name.
        may_hold_block: Whether shared experts may be inside the layer's module; see `Layout`.

    Returns:
        Qualified names of the linear layers.

    Raises:
        ValueError: If the shapes of a shared expert's linear layers are ambiguous.
    """
    block = layer.name.rpartition(".")[0]
    beside = {block, block.rpartition(".")[0], layer.name if may_hold_block else block}
    found = []
    for name, module in modules.items():
        parent, _, last = name.rpartition(".")
        if parent not in beside or not any(word in last for word in _SHARED):
            continue
        linears = _shapes(module)
        if len(linears) < 2:  # a gate of the shared expert
            continue
        back = [n for n, (d_out, d_in) in linears.items() if d_out == layer.d_out and d_in != layer.d_out]
        second = back if len(back) == 1 else [n for n in linears if n.rpartition(".")[2] in _USUAL_NAMES]
        if len(second) != 1:
            raise ValueError(
                f"the linear layers {sorted(linears)} of the shared expert {name!r} do not tell which one is "
                "down_proj; leave shared experts out, and name their layers with find_linear_layers"
            )
        found.append(f"{name}.{second[0]}")
    return found


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {plain_name(name): linear_shape(linear) for name, linear in linears_of(module).items()}


def _router_widths(parent: nn.Module, experts: nn.Module) -> set[int]:
    """The widths of matrices next to the experts with one row or column for each expert, which may be routers."""
    inside = {id(parameter) for parameter in experts.parameters()}
    shapes = [p.shape for p in parent.parameters() if p.dim() == 2 and id(p) not in inside]
    count = len(experts_of(experts))
    return {shape[1 - side] for shape in shapes for side in (0, 1) if shape[side] == count}
