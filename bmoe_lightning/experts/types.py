"""Expert layers, and the interface of a layout (a way in which models store experts)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol

from torch import Tensor, nn

_FIRST = ":"  # no name of a module has one


@dataclass(frozen=True)
class ExpertLayer:
    """The `down_proj` of all experts of one MoE layer, or a plain linear layer as its only expert.

    Or another projection of all experts (see `find_expert_layers`), whose name then stands in place of `down_proj`.

    Attributes:
        name: Qualified name of the module that holds the experts, as in `model.named_modules()`; for another projection
            than `down_proj` followed by a colon and the projection's name.
        index: Position among the expert layers of the model, from 0, in the order of `named_modules()`.
        num_experts: Number of experts E.
        d_in: Width of the input of `down_proj`.
        d_out: Width of its output.
        layout: Name of the layout, a key of `bmoe_lightning.experts.layouts.registry.LAYOUTS`.
        down_proj: Name of the second linear layer of an expert, or of its parameter, relative to the module that holds
            the experts (or to an expert, where each is a module); empty where the module is that layer.
        transposed: Whether one parameter holds the weights of all experts as `[E, d_in, d_out]`.
    """

    name: str
    index: int
    num_experts: int
    d_in: int
    d_out: int
    layout: str
    down_proj: str
    transposed: bool = False

    @property
    def module_name(self) -> str:
        """Qualified name of the module that holds the experts."""
        return self.name.partition(_FIRST)[0]

    @property
    def is_first(self) -> bool:
        """Whether this is a projection before the activation, rather than `down_proj`."""
        return _FIRST in self.name

    def as_first(self) -> ExpertLayer:
        """The same layer, which describes a projection before the activation, under a name of its own."""
        return replace(self, name=f"{self.name}{_FIRST}{self.down_proj}")


class Tap(Protocol):
    """Receives the routed tokens (slots) of an expert layer."""

    def record(
        self, inputs: Tensor, experts: Tensor, outputs: Tensor, tokens: Tensor | None, num_tokens: int
    ) -> Tensor:
        """Record slots; returns the outputs that the model continues with.

        Args:
            inputs: Input of `down_proj`, `[S, d_in]`.
            experts: Expert of each slot, `[S]` int64.
            outputs: Output of `down_proj`, `[S, d_out]`, before the routing weight.
            tokens: Position of each slot's token among the flattened tokens of this call, `[S]` int64; None if it is
                unknown.
            num_tokens: Number of flattened tokens in this call.
        """
        ...


Dropout = Callable[[Tensor, bool], Tensor]
"""`(activations, whether the module is in training mode) -> activations`."""


class Layout(ABC):
    """A way in which models store experts.

    To add one, write a subclass in a file of `bmoe_lightning.experts.layouts`, and its line in `registry.LAYOUTS`.

    Attributes:
        name: Name of the layout, as in `ExpertLayer.layout`.
        description: Modules that are detected, in words, for the error message if a model has no experts.
        uses_hooks: Whether `intercepted` works through forward hooks, which compiled code may skip.
        may_hold_block: Whether the module of the experts may be the MoE block itself, with router and shared experts.
    """

    name: ClassVar[str]
    description: ClassVar[str]
    uses_hooks: ClassVar[bool] = False
    may_hold_block: ClassVar[bool] = False

    @abstractmethod
    def detect(
        self, name: str, module: nn.Module, parent: nn.Module, down_proj: str | None, *, named: bool
    ) -> ExpertLayer | None:
        """Describe a module if it holds experts in this layout; None if it does not.

        Args:
            name: Qualified name of the module.
            module: The module.
            parent: The module that holds it; the model itself for the outermost one.
            down_proj: Name of the second linear layer within an expert, if the user gave it.
            named: Whether the user's pattern matches the module, so that it must hold experts if it has this layout.

        Raises:
            ValueError: If it holds experts whose `down_proj` is ambiguous or not accessible.
        """

    @abstractmethod
    def layer(self, name: str, index: int, module: nn.Module, down_proj: str) -> ExpertLayer:
        """Describe a module that is known to have this layout.

        Raises:
            ValueError: If it has not, or its `down_proj` weights are not accessible.
        """

    @abstractmethod
    def parameters(self, module: nn.Module, layer: ExpertLayer) -> dict[str, nn.Parameter]:
        """The parameters that hold the `down_proj` weights, by name relative to the module."""

    @abstractmethod
    def weights(self, model: nn.Module, layer: ExpertLayer) -> dict[str, Tensor]:
        """The effective `down_proj` weights of a layer, by the names of `parameters`, detached.

        These are the parameters plus what adapters add to them.
        """

    @abstractmethod
    def expert_parameters(self, module: nn.Module) -> dict[str, nn.Parameter]:
        """All weights of the experts, without routers and shared experts, by name relative to the module."""

    @abstractmethod
    def intercepted(
        self, module: nn.Module, layer: ExpertLayer, tap: Tap | None, dropout: Dropout | None
    ) -> AbstractContextManager[None]:
        """Apply dropout to the inputs of `down_proj`, and pass its slots to a tap; both may be None."""

    def first_projections(self, module: nn.Module, layer: ExpertLayer) -> list[str]:  # noqa: ARG002
        """The names of the projections before the activation, each in place of `down_proj` in an `ExpertLayer`.

        Raises:
            ValueError: If they cannot be tapped in this layout.
        """
        raise ValueError(
            f"the experts of {layer.name!r} ({self.description}) run their gate and up projections where they cannot "
            "be tapped; use projections=('down_proj',)"
        )

    def prepared(self, model: nn.Module) -> AbstractContextManager[None]:  # noqa: ARG002  (the default needs no model)
        """A context for the model in which its modules can be `intercepted`; does nothing by default."""
        return nullcontext()
