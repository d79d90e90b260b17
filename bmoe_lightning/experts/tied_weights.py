"""Tied weights: parameters that several modules of a model share."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence

from torch import nn

from bmoe_lightning.experts.layouts.registry import LAYOUTS
from bmoe_lightning.experts.module_tree import all_modules, module_at, own_parameters
from bmoe_lightning.experts.types import ExpertLayer


def parameter_owners(model: nn.Module) -> Counter[int]:
    """The number of modules that hold each parameter directly, by the parameter's id."""
    held = [
        {id(parameter) for parameter in own_parameters(module)} for module in all_modules(model) if module._parameters
    ]
    return Counter(itertools.chain.from_iterable(held))


def tied_modules(model: nn.Module, layer: ExpertLayer, owners: Counter[int]) -> list[nn.Module]:
    """The modules that use a layer's `down_proj` weights: the layer's module, and those with tied weights.

    Args:
        model: The model.
        layer: One of its expert layers.
        owners: The counts of `parameter_owners(model)`.
    """
    module = module_at(model, layer.module_name)
    if owners.total() == len(owners) or all(owners[id(parameter)] == 1 for parameter in module.parameters()):
        return [module]
    ids = weight_ids(module, layer)
    if all(owners[weight] == 1 for weight in ids):
        return [module]
    return [other for other in model.modules() if type(other) is type(module) and weight_ids(other, layer) == ids]


def weight_ids(module: nn.Module, layer: ExpertLayer) -> tuple[int, ...]:
    """The ids of a module's `down_proj` parameters, by expert; empty if it has no such experts."""
    try:
        return tuple(id(parameter) for parameter in LAYOUTS[layer.layout].parameters(module, layer).values())
    except AttributeError:  # a list of other modules
        return ()


def check_tied_weights(model: nn.Module, layers: Iterable[ExpertLayer]) -> None:
    """Refuse `down_proj` weights that are tied to other modules, whose use of the weights is in no slot.

    Raises:
        ValueError: If there are any; the message names the layer.
    """
    owners = parameter_owners(model)
    for layer in layers:
        alike = len(tied_modules(model, layer, owners))
        if any(owners[weight] != alike for weight in weight_ids(model.get_submodule(layer.module_name), layer)):
            raise ValueError(
                f"the weight of {layer.name!r} is tied to another module (a head to the embeddings, or experts to "
                "others), whose use of it the curvature would miss; leave this layer out, or untie the weights"
            )


def check_distinct(model: nn.Module, layers: Sequence[ExpertLayer]) -> None:
    """Check that no weight is counted twice.

    Raises:
        ValueError: If two have the same name, index or `down_proj` weight.
    """
    weights = [weight_ids(model.get_submodule(layer.module_name), layer) for layer in layers]
    for what, values in (
        ("name", [layer.name for layer in layers]),
        ("index", [layer.index for layer in layers]),
        ("down_proj weight", [weight for of_layer in weights for weight in of_layer]),
    ):
        if len(set(values)) < len(values):
            raise ValueError(
                f"two of the {len(layers)} layers have the same {what}: {[x.name for x in layers][:6]}; let "
                "each weight belong to one layer, and number later layers with find_linear_layers(first_index=...)"
            )
