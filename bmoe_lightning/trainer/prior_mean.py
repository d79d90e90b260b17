"""The weights from before fine-tuning: the prior mean, from which the evidence measures how far the experts moved."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import lightning as L
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from bmoe_lightning.experts import ExpertLayer, down_proj_weights
from bmoe_lightning.experts.fsdp import local_part
from bmoe_lightning.trainer.lightning_internals import is_restoring_checkpoint


class PriorMean:
    """CPU copies of the `down_proj` of every expert, taken once for each module.

    Args:
        find_layers: Finds the layers of a model; raises `ValueError` where there are none yet. None captures nothing.

    Attributes:
        weights: Weights as `down_proj_weights` names them, this rank's shards of sharded ones; None before a capture.
    """

    def __init__(self, find_layers: Callable[[nn.Module], list[ExpertLayer]] | None) -> None:
        self.weights: dict[str, Tensor] | None = None
        self._find_layers = find_layers
        self._module: weakref.ref[nn.Module] | None = None
        self._hook: RemovableHandle | None = None

    def is_of(self, module: nn.Module) -> bool:
        """Whether the copies were taken from this very module."""
        return self._module is not None and self._module() is module

    def capture(self, module: nn.Module) -> None:
        """Copy the weights, unless that was done, or the module has no experts yet."""
        if self._find_layers is None or self.is_of(module):
            return
        self.weights = self._module = None
        with suppress(ValueError):  # no experts yet: a model that is built in configure_model
            layers = self._find_layers(module)
            self.weights = {
                name: local_part(weight).values.to("cpu", copy=True)
                for layer in layers
                for name, weight in down_proj_weights(module, layer).items()
            }
            self._module = weakref.ref(module)

    def capture_on_load(self, trainer: L.Trainer, module: nn.Module) -> None:
        """Capture a model that is built later just before a checkpoint of the trainer overwrites it.

        Lightning calls no hook of a callback between the two.
        """

        def before_load(loading: nn.Module, *_: Any) -> None:  # a function, so that a copy of the module shares it
            if is_restoring_checkpoint(trainer):  # and it is not configure_model that loads pretrained weights
                self.capture(loading)

        self._hook = module.register_load_state_dict_pre_hook(before_load)

    def remove_hook(self) -> None:
        """Remove the hook of `capture_on_load`; may be called any number of times."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
