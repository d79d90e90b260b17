"""The prior mean: copies of the expert weights from before fine-tuning, for the evidence."""

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
    """CPU copies of the `down_proj` of every expert, captured once per module.

    Args:
        find_layers: Function that finds the layers of a model and raises `ValueError` if there are none yet. None
            captures nothing.

    Attributes:
        weights: Weights by the names of `down_proj_weights` (this rank's shards if sharded); None before a capture.
    """

    def __init__(self, find_layers: Callable[[nn.Module], list[ExpertLayer]] | None) -> None:
        self.weights: dict[str, Tensor] | None = None
        self._find_layers = find_layers
        self._module: weakref.ref[nn.Module] | None = None
        self._hook: RemovableHandle | None = None

    def __getstate__(self) -> dict[str, Any]:
        """All attributes except those that refer to the module, which another process does not share."""
        return vars(self) | {"_module": None, "_hook": None}

    def is_of(self, module: nn.Module) -> bool:
        """Whether the copies were captured from this module object."""
        return self._module is not None and self._module() is module

    def capture(self, module: nn.Module) -> None:
        """Copy the weights, unless they were captured already or the module has no experts yet."""
        if self._find_layers is None or self.is_of(module):
            return
        self.weights = self._module = None
        with suppress(ValueError):  # no experts yet: the model is created in configure_model
            layers = self._find_layers(module)
            self.weights = {
                name: local_part(weight).values.to("cpu", copy=True)
                for layer in layers
                for name, weight in down_proj_weights(module, layer).items()
            }
            self._module = weakref.ref(module)

    def capture_on_load(self, trainer: L.Trainer, module: nn.Module) -> None:
        """Capture a model that is created in `configure_model`, just before the trainer loads a checkpoint into it.

        Lightning calls no callback hook between the two.
        """

        def before_load(loading: nn.Module, *_: Any) -> None:  # a function, so that a copy of the module shares it
            if is_restoring_checkpoint(trainer):  # not when configure_model loads pretrained weights
                self.capture(loading)

        self._hook = module.register_load_state_dict_pre_hook(before_load)

    def remove_hook(self) -> None:
        """Remove the hook of `capture_on_load`. Idempotent."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
