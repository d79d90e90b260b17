"""Quantised weights, and other weights that a Gaussian posterior cannot cover."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from bmoe_lightning.experts.fsdp import is_sharded, sharding_refusal
from bmoe_lightning.experts.module_tree import all_modules
from bmoe_lightning.experts.threads import in_this_thread
from bmoe_lightning.experts.wrappers.names import unwrapped

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def is_packed(tensor: Tensor) -> bool:
    """Whether a tensor is of a subclass that stores its values in other tensors, as torchao's quantised ones are.

    Calls `torch.utils._python_dispatch.is_traceable_wrapper_subclass` (seen in torch 2.13).
    """
    return is_traceable_wrapper_subclass(tensor)


def unusable(weight: Any) -> str | None:
    """The reason why a weight is not supported, in words; None for a floating-point weight, sharded by FSDP2 or not."""
    if type(weight) is not nn.Parameter:  # a plain one is neither sharded nor packed, and is looked at most often
        if isinstance(weight, Tensor) and is_sharded(weight):
            return sharding_refusal(weight)
        if not isinstance(weight, Tensor) or is_packed(weight):
            return f"quantised ({type(weight).__name__})"
    return None if weight.dtype in _FLOATS else f"quantised ({weight.dtype})"


def check_down_proj(name: str, weight: Any) -> None:
    """Refuse `down_proj` weights that a Gaussian posterior cannot cover.

    Args:
        name: Name of the experts.
        weight: Their `down_proj` weight.

    Raises:
        ValueError: If it is quantised, or sharded by other means than FSDP2.
    """
    reason = unusable(weight)
    if reason is not None:
        raise ValueError(
            f"the down_proj weights of {name!r} are {reason}: the posterior is over weights in float64, float32, "
            "bfloat16 or float16. If they were quantised, exclude the experts from quantisation (most configurations "
            "take a list of modules to skip); other layers may be quantised"
        )


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer below its wrappers; a quantised one is often no `nn.Linear`."""
    return _is_unwrapped_linear(unwrapped(module))


def _is_quantised_linear(module: nn.Module) -> bool:
    return _is_unwrapped_linear(module) and unusable(getattr(module, "weight", None)) is not None


def _is_unwrapped_linear(module: nn.Module) -> bool:
    if isinstance(module, nn.Linear):
        return True
    known = "in_features" in vars(module) or hasattr(type(module), "in_features")
    if not known and not isinstance(module, torch.jit.ScriptModule):
        return False  # nearly all other modules, of which `getattr` takes long
    sizes = (getattr(module, name, None) for name in ("in_features", "out_features"))
    return all(isinstance(size, int) for size in sizes) and unusable(getattr(module, "weight", None)) is not None


def has_quantised_linear(model: nn.Module) -> bool:
    """Whether linear layers of a model are quantised, the values that flow through them perhaps too."""
    return any(map(_is_quantised_linear, all_modules(model)))


@contextmanager
def gradients_checked(model: nn.Module) -> Iterator[None]:
    """Check that quantised layers propagate gradients: one that does not would silently drop a part of them.

    Raises:
        RuntimeError: If one does not; raised from within the model, naming the layer.
    """
    with ExitStack() as stack:
        # Inside a wrapper, its inner module is found.
        quantised = [module for module in all_modules(model) if _is_quantised_linear(module)]
        names = {module: name for name, module in model.named_modules()} if quantised else {}
        for module in quantised:
            stack.callback(module.register_forward_hook(in_this_thread(_gradient_check(names[module]))).remove)
        yield


def _gradient_check(name: str) -> Any:
    def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        expected = any(isinstance(x, Tensor) and x.requires_grad for x in inputs)
        if torch.is_grad_enabled() and expected and isinstance(output, Tensor) and not output.requires_grad:
            raise RuntimeError(
                f"the quantised layer {name!r} ({type(unwrapped(module)).__name__}) passes no gradient to its input, "
                "so the experts below it would get none; use a quantisation with a backward pass, such as bitsandbytes"
            )

    return hook
