"""One forward for every fused experts module of transformers, in which each slot can be seen.

It is registered under the name `bmoe` with transformers' experts interface and computes what the model's own
implementations compute. Between the activation and the second linear layer it applies expert dropout; between that
layer and the routing weight it hands every slot to a tap.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from bmoe_lightning.experts.grouped_matmul import ExpertGroups
from bmoe_lightning.experts.layouts.intercept import attached_state, combine, second_product
from bmoe_lightning.experts.types import Dropout, ExpertLayer, Tap
from bmoe_lightning.experts.wrappers import added_by_adapters, check_second_weight, present

IMPLEMENTATION = "bmoe"


class FusedExperts:
    """The layout of modules that transformers decorated with `use_experts_implementation`; see `Layout`."""

    def layer(self, name: str, index: int, module: nn.Module, down_proj: str) -> ExpertLayer:
        """Describe a fused experts module."""
        weight = getattr(module, down_proj, None)
        if not is_fused_experts(module) or not isinstance(weight, nn.Parameter):
            raise ValueError(f"{name!r} is no module of fused experts with the second weights {down_proj!r}")
        # Each is absent before some version of transformers.
        parallel = getattr(module, "_is_expert_parallel", False) or getattr(module, "_is_hooked", False)
        if parallel or getattr(module, "num_experts", len(weight)) != len(weight):
            raise ValueError(
                f"the experts {name!r} are spread over processes (expert or tensor parallelism), so that each knows a "
                "part of them; load the model without a parallel plan"
            )
        check_second_weight(name, weight)
        transposed = bool(module.is_transposed)
        num_experts, first, second = weight.shape
        d_out, d_in = (second, first) if transposed else (first, second)
        return ExpertLayer(name, index, num_experts, d_in, d_out, "fused", down_proj, transposed)

    def parameters(self, module: nn.Module, layer: ExpertLayer) -> dict[str, nn.Parameter]:
        """The one parameter of all second weights."""
        return {layer.down_proj: module.get_parameter(layer.down_proj)}

    def weights(self, model: nn.Module, layer: ExpertLayer) -> dict[str, Tensor]:
        """The same, with what PEFT's adapters of whole parameters add."""
        weight = present(model.get_submodule(layer.name), layer.down_proj).detach()
        added = added_by_adapters(model, layer.name, layer.down_proj)
        return {layer.down_proj: weight if added is None else weight + added.to(weight)}

    def expert_parameters(self, module: nn.Module) -> dict[str, nn.Parameter]:
        """All parameters of the module."""
        return dict(module.named_parameters())

    def intercepted(
        self, module: nn.Module, layer: ExpertLayer, tap: Tap | None, dropout: Dropout | None
    ) -> AbstractContextManager[None]:
        """Attach to the module; the model has to run `fused_implementation`."""
        return attached_state(module, tap, dropout)


def is_fused_experts(module: nn.Module) -> bool:
    """Whether a module holds all experts in 3-D parameters and is dispatched by transformers' experts interface."""
    weight = getattr(module, "down_proj", None)
    return isinstance(weight, nn.Parameter) and weight.dim() == 3 and hasattr(module, "is_transposed")


def check_overlooked(name: str, module: nn.Module) -> None:
    """Refuse what would be fused experts if its second weights were plain, rather than leave them out of the posterior.

    Raises:
        ValueError: if the second weights are quantised, sharded or parametrised.
    """
    weight = getattr(module, "down_proj", None)
    if weight is None or isinstance(weight, nn.Module):
        return
    check_second_weight(name, weight)
    if hasattr(module, "is_transposed") and not isinstance(weight, nn.Parameter):
        raise ValueError(f"the second weights of {name!r} are computed from others (parametrised)")


@contextmanager
def fused_implementation(model: nn.Module) -> Iterator[None]:
    """Send the fused experts of a model through `tapped_experts_forward`; restore the implementation afterwards.

    Args:
        model: any module; the fused experts in it are switched. Without any nothing happens.

    Raises:
        RuntimeError: if the name `bmoe` is taken in transformers' registry.
    """
    fused: list[Any] = [module for module in model.modules() if is_fused_experts(module)]
    if not fused:
        yield
        return
    taken = ALL_EXPERTS_FUNCTIONS.get(IMPLEMENTATION)
    if taken is None:
        ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, tapped_experts_forward)
    elif taken is not tapped_experts_forward:
        raise RuntimeError(
            f"transformers already has an experts implementation called {IMPLEMENTATION!r} ({taken!r}); "
            "bmoe_lightning needs that name"
        )
    # Through each module's own configuration: a model's set_experts_implementation does not reach copies of it, nor
    # classes that are not in the file of their model.
    configs = {id(module.config): module.config for module in fused}
    before = [(config, _attribute(config), getattr(config, _attribute(config))) for config in configs.values()]
    try:
        for config, attribute, _ in before:
            setattr(config, attribute, IMPLEMENTATION)
        yield
    finally:
        for config, attribute, implementation in before:
            setattr(config, attribute, implementation)


def _attribute(config: Any) -> str:
    """What holds the implementation: setting transformers' property would set it in parts of the configuration too."""
    internal = "_experts_implementation_internal"
    return internal if hasattr(config, internal) else "_experts_implementation"


def outermost_pretrained(model: nn.Module) -> list[PreTrainedModel]:
    """The `PreTrainedModel`s in a module that lie in no other one."""
    if isinstance(model, PreTrainedModel):
        return [model]
    return [owner for child in model.children() for owner in outermost_pretrained(child)]


def tapped_experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Run all experts on the tokens routed to them.

    Args:
        self: a module that transformers decorated with `use_experts_implementation`.
        hidden_states: `[T, hidden]`.
        top_k_index: `[T, k]` expert of each slot; E and above stand for no expert, as in transformers.
        top_k_weights: `[T, k]` routing weights.

    Returns:
        `[T, hidden]`.
    """
    num_experts = len(self.down_proj)
    # A slot without an expert goes through the last one with a weight of zero: it moves nothing and is not counted.
    top_k_weights = top_k_weights.masked_fill(top_k_index >= num_experts, 0)
    groups = ExpertGroups(top_k_index.reshape(-1).clamp(max=num_experts - 1), num_experts)
    tokens = groups.order // top_k_index.shape[1]

    if self.has_gate:
        hidden = self._apply_gate(_linear(self, groups, hidden_states[tokens], "gate_up_proj"))
    else:
        hidden = self.act_fn(_linear(self, groups, hidden_states[tokens], "up_proj"))
    weight = self.down_proj if self.is_transposed else self.down_proj.mT
    output = second_product(self, groups, hidden, weight, tokens, len(top_k_index))
    if self.has_bias:
        output = output + self.down_proj_bias[groups.experts]
    # Absent before transformers 5.21.
    if getattr(self, "has_post_expert_norm", False):
        output = self.post_expert_norm(output)
    return combine(groups, output, top_k_weights).to(hidden_states.dtype)


def _linear(module: Any, groups: ExpertGroups, x: Tensor, name: str) -> Tensor:
    weight = getattr(module, name)
    # Grouped products ignore autocast; like transformers, the weights' dtype decides.
    output = groups.matmul(x.to(weight.dtype), weight if module.is_transposed else weight.mT)
    return output + getattr(module, f"{name}_bias")[groups.experts] if module.has_bias else output
