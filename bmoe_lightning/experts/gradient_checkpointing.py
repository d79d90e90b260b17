"""Gradient checkpointing of transformers, in evaluation mode too.

transformers recomputes activations in training mode only. The curvature pass and predictions run in evaluation mode,
where a user who enabled it has no memory for stored activations either.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from bmoe_lightning.experts.module_tree import all_modules
from bmoe_lightning.experts.threads import applies, in_this_thread, scope
from bmoe_lightning.experts.wrappers.transformers import (
    can_checkpoint_with_cache,
    checkpoint_function,
    imported_class,
    outermost_pretrained,
)

if TYPE_CHECKING:
    from transformers.modeling_layers import GradientCheckpointingLayer

# Arguments that transformers removes from a recomputed layer, too, under the names of various models.
_CACHES = ("past_key_values", "layer_past")


@contextmanager
def recomputed_activations(model: nn.Module) -> Iterator[None]:
    """Recompute activations of layers in evaluation mode where `gradient_checkpointing_enable` was called.

    Checkpoints are never reentrant, whatever was set: taps record nothing in reentrant ones. Layers get no key-value
    cache. The model is restored afterwards, also after an exception.

    Args:
        model: Any module; nothing changes if it has no checkpointed layers.

    Raises:
        RuntimeError: If the model is called with a cache; raised from within the model.
    """
    layer_class = imported_class("transformers.modeling_layers", "GradientCheckpointingLayer")
    layers = [m for m in all_modules(model) if isinstance(m, layer_class) and m.gradient_checkpointing]
    with ExitStack() as stack:
        if layers:
            for owner in outermost_pretrained(model):
                hook = in_this_thread(_refuse_caches)
                stack.callback(owner.register_forward_pre_hook(hook, with_kwargs=True).remove)
            for layer in layers:
                stack.enter_context(_recomputed(layer))
        yield


@contextmanager
def _recomputed(layer: GradientCheckpointingLayer) -> Iterator[None]:
    own, on_instance = layer.forward, "forward" in vars(layer)
    recompute, thread = _checkpoint_of(layer), scope()

    def forward(*args: Any, **kwargs: Any) -> Any:
        if not applies(thread):
            return own(*args, **kwargs)
        if not can_checkpoint_with_cache(layer):
            kwargs = _without_caches(kwargs)
        # Otherwise post-forward hooks, such as accelerate's, would not run after the last module.
        with set_checkpoint_early_stop(False):
            return recompute(functools.partial(own, **kwargs), *args)

    layer.forward = forward
    try:
        yield
    finally:
        if on_instance:
            layer.forward = own
        else:
            del layer.forward


def _checkpoint_of(layer: nn.Module) -> Callable[..., Any]:
    """The layer's checkpointing function, which may offload as well, in its non-reentrant form."""
    chosen = checkpoint_function(layer)
    # transformers sets a partial of a function with these two arguments. Nothing is random in evaluation mode.
    usual = chosen if isinstance(chosen, functools.partial) else checkpoint
    return functools.partial(usual, use_reentrant=False, preserve_rng_state=False)


def _without_caches(kwargs: dict[str, Any]) -> dict[str, Any]:
    """A layer's arguments without caches, which every recomputation would update again."""
    kept = {k: None if k in _CACHES or _is_cache(value) else value for k, value in kwargs.items()}
    return kept | ({"use_cache": False} if kwargs.get("use_cache") else {})


def _refuse_caches(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if any(map(_is_cache, (*args, *kwargs.values()))):
        raise RuntimeError(
            "class_logits calls the model with a cache of keys and values, which gradient checkpointing does not "
            "support; call gradient_checkpointing_disable() on the model, or pass use_cache=False in class_logits"
        )


def _is_cache(value: Any) -> bool:
    return isinstance(value, imported_class("transformers.cache_utils", "Cache"))
