"""The prior mean: copies of the expert weights from before fine-tuning, for the evidence."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from bmoe_lightning.experts import ExpertLayer, down_proj_parameters, down_proj_weights
from bmoe_lightning.experts.fsdp import has_shards, local_part, reshard
from bmoe_lightning.experts.sampled_values import SampledValues, sampled_values
from bmoe_lightning.experts.wrappers.names import plain_name
from bmoe_lightning.experts.wrappers.peft import is_adapter
from bmoe_lightning.experts.wrappers.quantised import unusable
from bmoe_lightning.methods.base import Method
from bmoe_lightning.methods.fitting import fingerprinted_layers, prior_mean_layers
from bmoe_lightning.methods.needs import NeedsError
from bmoe_lightning.trainer.data_passes import shards_weights
from bmoe_lightning.trainer.lightning_internals import is_restoring_checkpoint
from bmoe_lightning.utils.distributed import together
from bmoe_lightning.utils.messages import first_names

_KEY = "prior_mean"


class PriorMean:
    """CPU copies of the `down_proj` of every expert, captured once per module, and samples of them.

    The copies are made if methods use them. The samples are taken for any methods and go into the checkpoints of a
    training: who resumes it, maybe with other methods, has to give a module that has the same weights to begin with.

    Args:
        methods: Methods of the run.

    Attributes:
        weights: Weights by the names of `down_proj_weights` (this rank's shards if sharded); None before a capture, and
            if no method uses them.
    """

    def __init__(self, methods: Sequence[Method]) -> None:
        self.weights: dict[str, Tensor] | None = None
        self._methods = tuple(methods)
        self._given: Mapping[str, Tensor] | None = None
        self._samples: dict[str, SampledValues] = {}
        self._recorded: dict[str, SampledValues] | None = None  # in the checkpoint of this run; None if it loads none
        self._of_training = False
        self._module: weakref.ref[nn.Module] | None = None
        self._hook: RemovableHandle | None = None
        self._is_set_up = False  # and `on_fit_start` has not come yet

    def __getstate__(self) -> dict[str, Any]:
        """All attributes except those that refer to the module, which another process does not share."""
        return vars(self) | {"_module": None, "_hook": None}

    @contextmanager
    def given(self, weights: Mapping[str, Tensor] | None) -> Iterator[None]:
        """Use weights that the user gives in the place of captured ones, within the context.

        Args:
            weights: Weights by the names of `down_proj_weights`; None for those that were captured.
        """
        self._given = weights
        try:
            yield
        finally:
            self._given = None

    @property
    def used(self) -> Mapping[str, Tensor] | None:
        """The weights that a fit uses: given or captured ones, or None."""
        return self.weights if self._given is None else self._given

    def is_known(self, module: nn.Module) -> bool:
        """Whether weights were given, or captured from this module object."""
        return self._given is not None or self.is_of(module)

    def is_of(self, module: nn.Module) -> bool:
        """Whether weights were captured from this module object."""
        return self._module is not None and self._module() is module

    def setup(self, trainer: L.Trainer, module: nn.Module) -> None:
        """Capture the weights before a fit, or the trainer's load of a checkpoint, changes them.

        Sharded weights are captured in `on_fit_start`; Lightning loads a checkpoint into shards after that.
        """
        self._recorded = None
        self._is_set_up = True
        if not shards_weights(trainer):
            self.capture(module)
            self.capture_on_load(trainer, module)

    def capture(self, module: nn.Module) -> None:
        """Copy the weights, unless they were captured already or the module has no experts yet.

        A collective, if they are sharded.
        """
        if self.is_of(module):
            return
        self.weights, self._module, self._samples, self._of_training = None, None, {}, False
        with suppress(ValueError):  # no experts yet: the model is created in configure_model
            used = prior_mean_layers(self._methods, module)
            layers = {layer.name: layer for layer in [*used, *fingerprinted_layers(self._methods, module)]}
            weights: dict[str, Tensor] = {}
            sharded = has_shards(module)
            reshard(module)
            for layer in layers.values():
                if layer not in used and not _is_plain(module, layer):
                    continue
                found = down_proj_weights(module, layer)
                if layer in used:
                    weights |= {name: local_part(w).values.to("cpu", copy=True) for name, w in found.items()}
                with suppress(ValueError):  # ranks differ, which a fit refuses
                    values = sampled_values(list(found.values()), _dtype_of(module, layer), sharded=sharded)
                    self._samples[plain_name(layer.name)] = values
            self.weights = weights if used else None
            self._module = weakref.ref(module)

    def capture_on_load(self, trainer: L.Trainer, module: nn.Module) -> None:
        """Capture a model that is created in `configure_model`, just before the trainer loads a checkpoint into it.

        Lightning calls no callback hook between the two.
        """

        def before_load(loading: nn.Module, *_: Any) -> None:  # a function, so that a copy of the module shares it
            if is_restoring_checkpoint(trainer):  # not when configure_model loads pretrained weights
                self.capture(loading)

        self._hook = module.register_load_state_dict_pre_hook(before_load)

    def capture_before_saving(self, module: nn.Module) -> None:
        """Capture a model that is saved between `setup` and `on_fit_start`, as by a tuner that then tries steps."""
        if self._is_set_up:
            self.capture(module)

    def remove_hook(self) -> None:
        """Remove the hook of `capture_on_load`. Idempotent."""
        self._is_set_up = False
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def begin_loading(self) -> None:
        """Record that the trainer loads a checkpoint; one of another callback's run has no state for this one."""
        self._recorded = {}

    def state_dict(self) -> dict[str, Any]:
        """Samples of the weights from before training, for a checkpoint; empty if they are not known."""
        samples = self._samples if self._recorded is None else self._recorded
        return {_KEY: {name: list(found.text()) for name, found in samples.items()}} if samples else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the samples of a checkpoint; digests, which earlier versions wrote instead, are left out.

        Raises:
            ValueError: If they are damaged.
        """
        try:
            entries = {str(name): tuple(entry) for name, entry in state.get(_KEY, {}).items()}
            self._recorded = {
                name: SampledValues.from_text(dtype, values)
                for name, (dtype, values) in entries.items()
                if not isinstance(values, Mapping)
            }
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(
                f"the checkpoint's record of the weights from before training is damaged ({state[_KEY]!r:.80}); load "
                "another checkpoint of the run"
            ) from error

    def check(self, trainer: L.Trainer, module: nn.Module, methods: Sequence[Method], *, trains: bool) -> None:
        """Check that a run that resumes from a checkpoint began with the weights that its training began with.

        Nothing is compared where the user gives weights. A collective.

        Args:
            trainer: The trainer, after it has loaded its checkpoint, if there is one.
            module: The module.
            methods: Methods that are going to be fitted with the captured weights.
            trains: Whether the module is trained now; otherwise its weights may be trained ones.

        Raises:
            NeedsError: If it began with others, and methods use them.

        Warns:
            UserWarning: If the checkpoint does not tell, and methods use them.
        """
        self._of_training |= trains
        if self._recorded is None:
            if not self._of_training:
                self._samples = {}
            return
        methods = methods if self._given is None else ()
        recorded, names = self._recorded, [method.name for method in methods if method.needs.prior_mean]
        layers = [plain_name(layer.name) for layer in prior_mean_layers(methods, module)]

        def compare() -> None:
            if not trainer.is_global_zero or not names:
                return
            differing = [
                name
                for name in layers
                if name in recorded and name in self._samples and not recorded[name].same(self._samples[name])
            ]
            if differing:
                raise NeedsError(
                    f"before the checkpoint was loaded, the module had other weights than before training in "
                    f"{len(differing)} of {len(layers)} layers ({first_names(differing)}), and "
                    f"{', '.join(names)} measure how far training moved them. Build the module as it was built for "
                    "training, with the pretrained weights rather than with load_from_checkpoint; or use "
                    "prior_mean='zero', or fit these methods later with fit_posterior(prior_mean=...)."
                )
            if not recorded.keys() >= set(layers):
                warnings.warn(
                    "the checkpoint has no record of the weights from before training, the prior mean of "
                    f"{', '.join(names)}; they are taken to be those that the module had before the checkpoint was "
                    "loaded, which is wrong if it was built with load_from_checkpoint or another initialisation",
                    stacklevel=2,
                )

        together(compare, distributed=trainer.world_size > 1)


def _dtype_of(module: nn.Module, layer: ExpertLayer) -> torch.dtype:
    """The dtype of a layer's parameters, to which weights with merged adapters are rounded no more."""
    return next(iter(down_proj_parameters(module, layer).values())).dtype


def _is_plain(module: nn.Module, layer: ExpertLayer) -> bool:
    """Whether the weights of a layer are in its parameters, and can be read at no cost."""
    if any(is_adapter(part) for part in module.get_submodule(layer.module_name).modules()):
        return False
    return not any(p.device.type == "meta" or unusable(p) for p in down_proj_parameters(module, layer).values())
