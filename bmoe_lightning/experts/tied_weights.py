"""Weights that a model uses at several places."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from torch import nn

from bmoe_lightning.experts.layouts.registry import LAYOUTS
from bmoe_lightning.experts.types import ExpertLayer


def parameter_owners(model: nn.Module) -> Counter[int]:
    """How many modules hold each parameter as their own, by its id."""
    return Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))


def tied_modules(model: nn.Module, layer: ExpertLayer, owners: Counter[int]) -> list[nn.Module]:
    """The modules that multiply with a layer's second weights: its own, and others that are tied to it."""
    module = model.get_submodule(layer.name)
    own = weight_ids(module, layer)
    if all(owners[weight] == 1 for weight in own):
        return [module]
    return [other for other in model.modules() if type(other) is type(module) and weight_ids(other, layer) == own]


def weight_ids(module: nn.Module, layer: ExpertLayer) -> tuple[int, ...]:
    """The ids of a module's second weights, expert by expert; none if it is no module of the layer's kind."""
    try:
        return tuple(id(parameter) for parameter in LAYOUTS[layer.layout].parameters(module, layer).values())
    except AttributeError:  # a list of something else
        return ()


def check_ties(model: nn.Module, layers: Iterable[ExpertLayer]) -> None:
    """Refuse second weights through which a model moves its logits in ways that the layer's slots do not show.

    Raises:
        ValueError: naming the layer.
    """
    owners = parameter_owners(model)
    for layer in layers:
        alike = len(tied_modules(model, layer, owners))
        if any(owners[weight] != alike for weight in weight_ids(model.get_submodule(layer.name), layer)):
            raise ValueError(
                f"the weight of {layer.name!r} is tied to another module (a head to the embeddings, or experts at "
                "other places), through which it moves the logits in ways that a linear layer's slots do not show"
            )


def check_distinct(model: nn.Module, layers: Sequence[ExpertLayer]) -> None:
    """Refuse layers that would count a weight twice.

    Raises:
        ValueError: if two have the same name, index or second weight.
    """
    weights = [weight_ids(model.get_submodule(layer.name), layer) for layer in layers]
    for what, values in (
        ("name", [layer.name for layer in layers]),
        ("index", [layer.index for layer in layers]),
        ("second weight", [weight for of_layer in weights for weight in of_layer]),
    ):
        if len(set(values)) < len(values):
            raise ValueError(
                f"two of the {len(layers)} layers have the same {what}: {[x.name for x in layers][:6]}; each second "
                "weight belongs to one layer, and find_linear_layers takes first_index= to number on"
            )
