"""The layers of a posterior located in a model, for as long as neither the model nor its weights change."""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch
from torch import nn

from bmoe_lightning.curvature.factors import KroneckerFactors, LayerFactors
from bmoe_lightning.experts.discovery import locate_expert_layers
from bmoe_lightning.experts.types import ExpertLayer
from bmoe_lightning.experts.wrappers.accelerate import execution_device
from bmoe_lightning.experts.write_counts import weights_state


@dataclass
class Binding:
    """The layers of a posterior located in a model, and the state of the model's weights at that time.

    Attributes:
        model: The model.
        device: Its device.
        weights: State of its weights; see `weights_state`.
        layers: The model's layer for each layer of the factors.
        stored: The factors of each layer, where the posterior has them.
        factors: The same on the layer's device, unless they are offloaded.
        offload: Whether they are.
        owners_checked: Whether it was checked that the model does not mix examples.
    """

    model: weakref.ref[nn.Module]
    device: torch.device
    weights: tuple[tuple[int, int], ...]
    layers: list[ExpertLayer]
    stored: tuple[LayerFactors, ...]
    factors: tuple[LayerFactors, ...]
    offload: bool
    owners_checked: bool = False

    @classmethod
    def of(cls, model: nn.Module, factors: KroneckerFactors, *, offload: bool) -> Binding:
        """Locate the layers in a model, and move the factors to their devices.

        Args:
            model: The model, with resharded weights.
            factors: Factors of the posterior.
            offload: Whether the factors stay where they are.

        Raises:
            ValueError: If the model lacks a layer, or has one of another size.
        """
        device = execution_device(model)
        layers = _match_layers(model, factors)
        moved = factors.layers
        if not offload:
            places = [execution_device(model.get_submodule(layer.module_name)) for layer in layers]
            moved = tuple(
                layer.to(device if place.type == "meta" else place) for layer, place in zip(moved, places, strict=True)
            )
        weights = weights_state(model)
        return cls(weakref.ref(model), device, weights, layers, factors.layers, moved, offload)

    def is_of(self, model: nn.Module) -> bool:
        """Whether this is of a model, on its device and with its weights."""
        return self.model() is model and self.device == execution_device(model) and self.weights == weights_state(model)


def _match_layers(model: nn.Module, factors: KroneckerFactors) -> list[ExpertLayer]:
    """The model's layer for each layer of the factors, with its sizes checked."""
    described = {layer.name: layer for layer in factors.expert_layers}
    layers = locate_expert_layers(model, [described[layer.name] for layer in factors.layers])
    for layer, known in zip(layers, factors.layers, strict=True):
        found, expected = (layer.num_experts, layer.d_in, layer.d_out), (known.num_experts, known.d_in, known.d_out)
        if found != expected:
            raise ValueError(
                f"the posterior's layer {known.name!r} with (experts, d_in, d_out) = {expected} does not fit the "
                f"model's {layer.name!r} with {found}; load it with the model that it was fitted to"
            )
    return layers
