"""Plain linear layers, each the only expert of its layer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch import Tensor, nn

from bmoe_lightning.experts.layouts.hooks import check_linear_weight, intercept_linear
from bmoe_lightning.experts.types import Dropout, ExpertLayer, Layout, Tap
from bmoe_lightning.experts.wrappers.linear import effective_weight, linear_shape, linear_weight_name
from bmoe_lightning.experts.wrappers.quantised import is_linear


class LinearLayer(Layout):
    """An `nn.Linear` as the only expert of its layer; found by name alone (`find_linear_layers`)."""

    name = "linear"
    description = "plain linear layers, which find_linear_layers finds by name"
    uses_hooks = True

    def detect(
        self, name: str, module: nn.Module, parent: nn.Module, down_proj: str | None, *, named: bool
    ) -> ExpertLayer | None:
        """Detect nothing: every model has linear layers that are not experts."""
        return None

    def layer(self, name: str, index: int, module: nn.Module, down_proj: str) -> ExpertLayer:
        """Describe a linear layer."""
        if not is_linear(module) or down_proj:
            raise ValueError(f"{name!r} is no linear layer but a {type(module).__name__}")
        check_linear_weight(name, module)
        d_out, d_in = linear_shape(module)
        return ExpertLayer(name, index, 1, d_in, d_out, self.name, "")

    def parameters(self, module: nn.Module, layer: ExpertLayer) -> dict[str, nn.Parameter]:
        """The weight of the layer."""
        name = linear_weight_name(module)
        return {name: module.get_parameter(name)}

    def weights(self, model: nn.Module, layer: ExpertLayer) -> dict[str, Tensor]:
        """The effective weight of the layer, adapters included."""
        module = model.get_submodule(layer.module_name)
        return {linear_weight_name(module): effective_weight(module)}

    def expert_parameters(self, module: nn.Module) -> dict[str, nn.Parameter]:
        """Weight and bias of the layer."""
        return dict(module.named_parameters())

    @contextmanager
    def intercepted(
        self, module: nn.Module, layer: ExpertLayer, tap: Tap | None, dropout: Dropout | None
    ) -> Iterator[None]:
        """Hook into the layer."""
        with ExitStack() as stack:
            intercept_linear(stack, module, tap, dropout, 0, knows_tokens=True)
            yield
