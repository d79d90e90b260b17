"""The weights from before fine-tuning, from which the evidence measures how far the experts have moved."""

from __future__ import annotations

import weakref
from contextlib import suppress
from typing import Any

import lightning as L
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from bmoe_lightning.experts import down_proj_weights
from bmoe_lightning.experts.fsdp import local_part
from bmoe_lightning.methods.options import FitSettings
from bmoe_lightning.trainer.data_passes import restores_checkpoint


class PriorMean:
    """Copies of the second weights of all experts on the CPU, taken once a module, if a method will ask for them.

    Args:
        settings: which methods, and which layers.

    Attributes:
        weights: as `down_proj_weights` names them, of sharded ones this process's parts; None where nothing was taken.
    """

    def __init__(self, settings: FitSettings) -> None:
        self.weights: dict[str, Tensor] | None = None
        self._settings = settings
        self._module: weakref.ref[nn.Module] | None = None
        self._watched: RemovableHandle | None = None

    def is_of(self, module: nn.Module) -> bool:
        """Whether the copies were taken from this very module."""
        return self._module is not None and self._module() is module

    def remember(self, module: nn.Module) -> None:
        """Take the copies, unless they are there, or the module has no experts yet."""
        if not self._settings.needs_prior_mean or self.is_of(module):
            return
        self.weights = self._module = None
        with suppress(ValueError):  # no experts yet: a module that is built in configure_model
            layers = self._settings.find_layers(module)
            self.weights = {
                name: local_part(weight).values.to("cpu", copy=True)
                for layer in layers
                for name, weight in down_proj_weights(module, layer).items()
            }
            self._module = weakref.ref(module)

    def watch(self, trainer: L.Trainer, module: nn.Module) -> None:
        """Remember a module whose model is built later, when a checkpoint of the trainer is about to overwrite it.

        Lightning calls no hook of a callback between the two.
        """

        def before(loading: nn.Module, *_: Any) -> None:  # a function, so that a copy of the module shares it
            if restores_checkpoint(trainer):  # and it is not configure_model that loads pretrained weights
                self.remember(loading)

        self._watched = module.register_load_state_dict_pre_hook(before)

    def unwatch(self) -> None:
        """Take the watch away again; may be called any number of times."""
        if self._watched is not None:
            self._watched.remove()
            self._watched = None
