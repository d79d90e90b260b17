"""Fused experts of transformers: an experts implementation in which every slot can be tapped.

It is registered as `bmoe` with transformers' experts interface and is equivalent to the implementations of
transformers. Before `down_proj` it applies expert dropout; between `down_proj` and the routing weight it passes every
slot to a tap.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from bmoe_lightning.experts.grouped_matmul import ExpertGroups
from bmoe_lightning.experts.layouts.intercept import attached_state, combine, down_proj_product, expert_state
from bmoe_lightning.experts.module_tree import all_modules
from bmoe_lightning.experts.threads import applies, scope
from bmoe_lightning.experts.types import Dropout, ExpertLayer, Layout, Tap
from bmoe_lightning.experts.wrappers.linear import effective_parameter
from bmoe_lightning.experts.wrappers.quantised import check_down_proj
from bmoe_lightning.experts.wrappers.transformers import experts_implementation_attribute, has_parallel_plan

IMPLEMENTATION = "bmoe"
_SWITCH = "_bmoe_switch"


class FusedExperts(Layout):
    """Modules that transformers decorated with `use_experts_implementation`: 3-D parameters for all experts."""

    name = "fused"
    description = "fused experts of transformers' experts interface"

    def detect(
        self, name: str, module: nn.Module, parent: nn.Module, down_proj: str | None, *, named: bool
    ) -> ExpertLayer | None:
        """Detect a fused experts module, by its parameters.

        Raises:
            ValueError: If its `down_proj` is quantised, parametrised or sharded: such experts must not be left out of
                the posterior silently.
        """
        if is_fused_experts(module):
            return self.layer(name, 0, module, "down_proj")
        weight = getattr(module, "down_proj", None)
        if weight is None or isinstance(weight, nn.Module):
            return None
        check_down_proj(name, weight)
        if hasattr(module, "is_transposed") and not isinstance(weight, nn.Parameter):
            raise ValueError(
                f"the down_proj weights of {name!r} are parametrised (computed from other parameters); remove the "
                "parametrisation"
            )
        return None

    def layer(self, name: str, index: int, module: nn.Module, down_proj: str) -> ExpertLayer:
        """Describe a fused experts module."""
        weight = getattr(module, down_proj, None)
        if not is_fused_experts(module) or not isinstance(weight, nn.Parameter):
            raise ValueError(f"{name!r} is no module of fused experts with the parameter {down_proj!r}")
        if has_parallel_plan(module) or getattr(module, "num_experts", len(weight)) != len(weight):
            raise ValueError(
                f"the experts {name!r} are sharded by expert or tensor parallelism, which is not supported; load the "
                "model without a parallel plan"
            )
        check_down_proj(name, weight)
        transposed = bool(module.is_transposed)
        num_experts, first, second = weight.shape
        d_out, d_in = (second, first) if transposed else (first, second)
        return ExpertLayer(name, index, num_experts, d_in, d_out, self.name, down_proj, transposed)

    def parameters(self, module: nn.Module, layer: ExpertLayer) -> dict[str, nn.Parameter]:
        """The one parameter with the `down_proj` of all experts."""
        return {layer.down_proj: module.get_parameter(layer.down_proj)}

    def weights(self, model: nn.Module, layer: ExpertLayer) -> dict[str, Tensor]:
        """The effective value of that parameter, including PEFT's `target_parameters` adapters."""
        return {layer.down_proj: effective_parameter(model, layer.module_name, layer.down_proj)}

    def expert_parameters(self, module: nn.Module) -> dict[str, nn.Parameter]:
        """All parameters of the module."""
        return dict(module.named_parameters())

    def intercepted(
        self, module: nn.Module, layer: ExpertLayer, tap: Tap | None, dropout: Dropout | None
    ) -> AbstractContextManager[None]:
        """Attach tap and dropout to the module; they apply while the model is `prepared`."""
        return attached_state(module, tap, dropout, first=layer.down_proj if layer.is_first else None)

    def first_projections(self, module: nn.Module, layer: ExpertLayer) -> list[str]:
        """The parameter with gate and up projection, or with the up projection of experts without a gate."""
        return ["gate_up_proj" if getattr(module, "has_gate", True) else "up_proj"]

    def prepared(self, model: nn.Module) -> AbstractContextManager[None]:
        """Run the model's fused experts through `tapped_experts_forward`."""
        return fused_implementation(model)


def is_fused_experts(module: nn.Module) -> bool:
    """Whether a module holds all experts in 3-D parameters and is dispatched by transformers' experts interface."""
    if "down_proj" not in module._parameters:  # which takes less than `getattr` of the many modules without
        return False
    weight = module._parameters["down_proj"]
    return weight is not None and weight.dim() == 3 and hasattr(module, "is_transposed")


@contextmanager
def fused_implementation(model: nn.Module) -> Iterator[None]:
    """Run the fused experts of a model through `tapped_experts_forward`; restore the implementation afterwards.

    This thread alone does, unless within `bmoe_lightning.experts.threads.in_all_threads`; others run the implementation
    of before.

    Args:
        model: Any module; nothing changes if it has no fused experts.

    Raises:
        RuntimeError: If the name `bmoe` is taken in transformers' registry.
    """
    fused: list[Any] = [module for module in all_modules(model) if is_fused_experts(module)]
    if not fused:
        yield
        return
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS  # late: slow, and imported by such a model already

    taken = ALL_EXPERTS_FUNCTIONS.get(IMPLEMENTATION)
    if taken is None:
        ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, tapped_experts_forward)
    elif taken is not tapped_experts_forward:
        raise RuntimeError(
            f"transformers already has an experts implementation called {IMPLEMENTATION!r} ({taken!r}), the name that "
            "bmoe_lightning uses; register it under another name"
        )
    # Through the configuration of each module: set_experts_implementation of a model does not reach copies of its
    # configuration, nor classes that are not in the file of their model.
    configs = {id(module.config): module.config for module in fused}
    attributes = [(config, experts_implementation_attribute(config)) for config in configs.values()]
    before = [(config, attribute, getattr(config, attribute)) for config, attribute in attributes]
    implementations = {id(config): implementation for config, _, implementation in before}
    outer = [(module, module.__dict__.get(_SWITCH)) for module in fused]
    try:
        for module, switch in outer:
            module.__dict__[_SWITCH] = _Switch(scope(), implementations[id(module.config)], switch)
        for config, attribute, _ in before:
            setattr(config, attribute, IMPLEMENTATION)
        yield
    finally:
        for config, attribute, implementation in before:
            setattr(config, attribute, implementation)
        for module, switch in outer:
            if switch is None:
                module.__dict__.pop(_SWITCH, None)
            else:
                module.__dict__[_SWITCH] = switch


@dataclass(frozen=True)
class _Switch:
    """A switch of a module to `tapped_experts_forward`.

    Attributes:
        thread: The thread in which it applies (see `bmoe_lightning.experts.threads.scope`).
        implementation: The implementation of before, which other threads run.
        outer: The switch of before, if that was `tapped_experts_forward` too.
    """

    thread: int | None
    implementation: str | None
    outer: _Switch | None

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy of the module, made meanwhile by another thread, runs the implementation that this thread runs.
        return _Switch, (None, self.implementation, None)


def _implementation_here(module: nn.Module) -> str | None:
    """The implementation that a module runs in this thread."""
    switch: _Switch | None = module.__dict__.get(_SWITCH)
    implementation: str | None = IMPLEMENTATION
    while switch is not None and not applies(switch.thread):
        implementation = switch.implementation
        switch = switch.outer
    return implementation


def _implemented_forward(module: nn.Module, implementation: str | None) -> Callable[..., Tensor]:
    """The experts forward that transformers dispatches a module's to."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    own: Any = getattr(type(module).forward, "__wrapped__", None)  # set by use_experts_implementation
    found: Callable[..., Tensor] = ALL_EXPERTS_FUNCTIONS.get_interface(implementation, own)  # type: ignore[arg-type]
    return found


def tapped_experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Run all experts on the tokens routed to them.

    Args:
        self: A module that transformers decorated with `use_experts_implementation`.
        hidden_states: Tokens `[T, hidden]`.
        top_k_index: Expert of each slot, `[T, k]`; E and above mean no expert, as in transformers.
        top_k_weights: Routing weights `[T, k]`.

    Returns:
        `[T, hidden]`.
    """
    implementation = _implementation_here(self)
    if implementation != IMPLEMENTATION:
        return _implemented_forward(self, implementation)(self, hidden_states, top_k_index, top_k_weights)
    num_experts = len(self.down_proj)
    # A slot without an expert runs through the last one with a weight of zero: its gradient is zero.
    top_k_weights = top_k_weights.masked_fill(top_k_index >= num_experts, 0)
    groups = ExpertGroups(top_k_index.reshape(-1).clamp(max=num_experts - 1), num_experts)
    tokens = groups.order // top_k_index.shape[1]

    if self.has_gate:
        hidden = self._apply_gate(_linear(self, groups, hidden_states, tokens, "gate_up_proj"))
    else:
        hidden = self.act_fn(_linear(self, groups, hidden_states, tokens, "up_proj"))
    weight = self.down_proj if self.is_transposed else self.down_proj.mT
    output = down_proj_product(self, groups, hidden, weight, tokens, len(top_k_index))
    if self.has_bias:
        output = output + self.down_proj_bias[groups.experts]
    # Absent before transformers 5.21.
    if getattr(self, "has_post_expert_norm", False):
        output = self.post_expert_norm(output)
    return combine(groups, output, top_k_weights).to(hidden_states.dtype)


def _linear(module: Any, groups: ExpertGroups, hidden_states: Tensor, tokens: Tensor, name: str) -> Tensor:
    weight, x = getattr(module, name), hidden_states[tokens]
    # Grouped products ignore autocast; like transformers, the weights' dtype decides.
    output = groups.matmul(x.to(weight.dtype), weight if module.is_transposed else weight.mT)
    state = expert_state(module)
    if state is not None and name in state.first:
        output = state.first[name].record(x, groups.experts, output, tokens, len(hidden_states))
    return output + getattr(module, f"{name}_bias")[groups.experts] if module.has_bias else output
