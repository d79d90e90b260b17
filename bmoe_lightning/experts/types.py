"""What an expert layer is, and what every way of storing experts has to offer the engine."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor, nn

LayoutName = Literal["fused", "modules", "linear", "adapted"]


@dataclass(frozen=True)
class ExpertLayer:
    """The second linear layers of all experts of one MoE layer, or a plain linear layer as its only expert.

    Attributes:
        name: qualified name of the module that holds the experts, as in `model.named_modules()`.
        index: position among the expert layers of the model, from 0, in the order of `named_modules()`.
        num_experts: E.
        d_in: width of the activation that enters the second linear layer.
        d_out: width of its output.
        layout: `"fused"` (one parameter `[E, d_out, d_in]`, or its transpose, behind transformers' experts interface),
            `"modules"` (one `nn.Linear` an expert), `"linear"` (one `nn.Linear`, E = 1) or `"adapted"` (a class of
            modules that `register_experts` knows).
        down_proj: name of the second linear layer or its parameter, relative to the experts' module (fused, adapted) or
            to an expert (modules); empty where the module is that layer (linear).
        transposed: whether a weight of all experts is stored as `[E, d_in, d_out]`.
    """

    name: str
    index: int
    num_experts: int
    d_in: int
    d_out: int
    layout: LayoutName
    down_proj: str
    transposed: bool = False


class Tap(Protocol):
    """What sees the slots of an expert layer."""

    def record(
        self, inputs: Tensor, experts: Tensor, outputs: Tensor, tokens: Tensor | None, num_tokens: int
    ) -> Tensor:
        """Take slots; return the outputs to go on with.

        Args:
            inputs: `[S, d_in]`.
            experts: `[S]` int64.
            outputs: `[S, d_out]`, before the routing weight.
            tokens: `[S]` int64, position of each slot's token among the flattened tokens of this call, or None where
                nobody knows it.
            num_tokens: how many flattened tokens there were.
        """
        ...


Dropout = Callable[[Tensor, bool], Tensor]
"""`(activations, whether the module is in training mode) -> activations`."""


class Layout(Protocol):
    """One way in which models store experts."""

    def layer(self, name: str, index: int, module: nn.Module, down_proj: str) -> ExpertLayer:
        """Describe a module that is stored this way.

        Raises:
            ValueError: if it is not, or its second weights are out of reach.
        """
        ...

    def parameters(self, module: nn.Module, layer: ExpertLayer) -> dict[str, nn.Parameter]:
        """The parameters of the second linear layers, by name relative to the module."""
        ...

    def weights(self, model: nn.Module, layer: ExpertLayer) -> dict[str, Tensor]:
        """What the second linear layers of a model's layer multiply with, by the same names, detached.

        That is the parameters, and what adapters add to them.
        """
        ...

    def expert_parameters(self, module: nn.Module) -> dict[str, nn.Parameter]:
        """All weights of the experts, routers and shared experts left out, by name relative to the module."""
        ...

    def intercepted(
        self, module: nn.Module, layer: ExpertLayer, tap: Tap | None, dropout: Dropout | None
    ) -> AbstractContextManager[None]:
        """Drop activations before the second linear layers, and hand their slots to a tap; either may be None."""
        ...
