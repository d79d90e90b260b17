"""Experts that are separate modules in an `nn.ModuleList` or `nn.ModuleDict`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch import Tensor, nn

from bmoe_lightning.experts.layouts.hooks import check_linear_weight, intercept_linear
from bmoe_lightning.experts.layouts.structure import down_proj_name, experts_of
from bmoe_lightning.experts.types import Dropout, ExpertLayer, Layout, Tap
from bmoe_lightning.experts.wrappers.linear import effective_weight, linear_shape, linear_weight_name, linears_of
from bmoe_lightning.experts.wrappers.names import is_wrapped_name, plain_name
from bmoe_lightning.experts.wrappers.quantised import is_linear


class ModuleExperts(Layout):
    """An `nn.ModuleList` or `nn.ModuleDict` with one module for each expert, found by structure."""

    name = "modules"
    description = "an nn.ModuleList or nn.ModuleDict of experts with two or three nn.Linear each beside a router"
    uses_hooks = True

    def detect(
        self, name: str, module: nn.Module, parent: nn.Module, down_proj: str | None, *, named: bool
    ) -> ExpertLayer | None:
        """Detect a list of experts by the shapes of their linear layers."""
        if not isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            return None
        found = down_proj_name(name, module, parent, down_proj, named=named)
        return None if found is None else self.layer(name, 0, module, found)

    def layer(self, name: str, index: int, module: nn.Module, down_proj: str) -> ExpertLayer:
        """Describe a list of experts whose second linear layer has the given name."""
        experts = experts_of(module)
        if not experts:
            raise ValueError(f"{name!r} is no list of experts but a {type(module).__name__}")
        shapes = set()
        for key, expert in experts.items():
            linear = _down_proj_of(expert, down_proj)
            if linear is None:
                raise ValueError(
                    f"experts of {name!r} have no linear layer {down_proj!r}; they have {sorted(linears_of(expert))}"
                )
            check_linear_weight(f"{name}.{key}.{down_proj}", linear)
            shapes.add(linear_shape(linear))
        if len(shapes) > 1:
            raise ValueError(f"the down_proj layers of the experts in {name!r} differ in shape: {sorted(shapes)}")
        d_out, d_in = shapes.pop()
        return ExpertLayer(name, index, len(experts), d_in, d_out, self.name, down_proj)

    def parameters(self, module: nn.Module, layer: ExpertLayer) -> dict[str, nn.Parameter]:
        """The weight of each expert's `down_proj`; under an adapter of PEFT, that of the adapted layer."""
        names = [f"{name}.{linear_weight_name(linear)}" for name, linear in self._linears(module, layer).items()]
        return {name: module.get_parameter(name) for name in names}

    def weights(self, model: nn.Module, layer: ExpertLayer) -> dict[str, Tensor]:
        """The effective weight of each expert's `down_proj`, adapters included."""
        linears = self._linears(model.get_submodule(layer.module_name), layer)
        return {f"{name}.{linear_weight_name(x)}": effective_weight(x) for name, x in linears.items()}

    def expert_parameters(self, module: nn.Module) -> dict[str, nn.Parameter]:
        """All parameters of the list."""
        return dict(module.named_parameters())

    @contextmanager
    def intercepted(
        self, module: nn.Module, layer: ExpertLayer, tap: Tap | None, dropout: Dropout | None
    ) -> Iterator[None]:
        """Hook into the `down_proj` of every expert."""
        with ExitStack() as stack:
            for expert, linear in enumerate(self._linears(module, layer).values()):
                intercept_linear(stack, linear, tap, dropout, expert, knows_tokens=False)
            yield

    def first_projections(self, module: nn.Module, layer: ExpertLayer) -> list[str]:
        """The names of an expert's other linear layers, by which it is entered."""
        expert = next(iter(experts_of(module).values()))
        down = _down_proj_of(expert, layer.down_proj)
        return [plain_name(name) for name, linear in linears_of(expert).items() if linear is not down]

    def _linears(self, module: nn.Module, layer: ExpertLayer) -> dict[str, nn.Module]:
        found = {}
        for name, expert in experts_of(module).items():
            linear = _down_proj_of(expert, layer.down_proj)
            if linear is None:
                raise AttributeError(f"{name!r} has no linear layer {layer.down_proj!r}")
            found[f"{name}.{layer.down_proj}"] = linear
        return found


def _down_proj_of(expert: nn.Module, down_proj: str) -> nn.Module | None:
    """The `down_proj` of an expert, with or without wrappers in between."""
    try:
        found = expert.get_submodule(down_proj)
    except AttributeError:
        found = None
    if found is not None and is_linear(found) and not is_wrapped_name(down_proj):
        return found
    linears = {plain_name(name): linear for name, linear in linears_of(expert).items()}
    return linears.get(plain_name(down_proj))
