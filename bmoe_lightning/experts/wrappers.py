"""What other libraries put around a model's layers: adapters, compilation, checkpointing, offloading, quantisation.

Nothing of PEFT, accelerate or bitsandbytes is imported: each is told by the attributes that it adds.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from bmoe_lightning.experts.fsdp import is_sharded, local_part, sharding_refusal, unsharded_class

# Under which names wrappers keep the module that was there before.
_INNER = ("base_layer", "original_module", "_orig_mod", "_checkpoint_wrapped_module")
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_ADAPTED_SHARDS = (
    "the second weights have adapters of PEFT and are sharded over processes, so that what they add up to is known "
    "nowhere; merge the adapters into the weights, shard less than these, or use methods without an evidence"
)


def _inner(module: nn.Module) -> str | None:
    """Under which name a wrapper keeps what it wraps, or PEFT's copy of it that is in use; None for no wrapper."""
    copies: Any = module._modules.get("modules_to_save")
    if copies is not None and not getattr(module, "disable_adapters", False):
        active = next((name for name in getattr(module, "active_adapters", ()) if name in copies), None)
        if active is not None:
            return f"modules_to_save.{active}"
    return next((name for name in _INNER if module._modules.get(name) is not None), None)


def unwrapped(module: nn.Module) -> nn.Module:
    """The module itself, below what was put around it."""
    name = _inner(module)
    return module if name is None else unwrapped(module.get_submodule(name))


def plain_name(name: str) -> str:
    """A qualified name without the parts that wrappers add."""
    name = re.sub(r"(^|\.)modules_to_save\.[^.]+", "", name)
    return ".".join(part for part in name.split(".") if part and part not in _INNER)


def is_wrapped_name(name: str) -> bool:
    """Whether a module is what some wrapper wraps, rather than the outermost of its kind."""
    owner, _, last = name.rpartition(".")
    return last in _INNER or owner.rpartition(".")[2] == "modules_to_save"


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer below its wrappers; a quantised one is often no `nn.Linear`."""
    module = unwrapped(module)
    if isinstance(module, nn.Linear):
        return True
    sizes = (getattr(module, "in_features", None), getattr(module, "out_features", None))
    return all(isinstance(size, int) for size in sizes) and unusable(getattr(module, "weight", None)) is not None


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """`(d_out, d_in)` of a linear layer; a packed weight has another shape."""
    linear: Any = unwrapped(module)
    return linear.out_features, linear.in_features


def linears_of(module: nn.Module, prefix: str = "") -> dict[str, nn.Module]:
    """The linear layers of a module by name, in order; one with wrappers is one layer, under the outermost's name."""
    if is_linear(module):
        return {prefix: module}
    found: dict[str, nn.Module] = {}
    for name, child in module.named_children():
        found |= linears_of(child, f"{prefix}.{name}" if prefix else name)
    return found


def linear_weight_name(module: nn.Module) -> str:
    """The name of a linear layer's own weight, relative to its outermost wrapper."""
    inner = _inner(module)
    if inner is None:
        return "weight"
    return f"{inner}.{linear_weight_name(module.get_submodule(inner))}"


@torch.no_grad()
def effective_weight(module: nn.Module) -> Tensor:
    """What a linear layer multiplies with, `[d_out, d_in]`, detached, adapters included.

    Where there are wrappers the layer is asked: it is given the unit vectors, and zero for its bias.
    """
    if unsharded_class(module) is nn.Linear:
        return present(module, "weight").detach()
    linear: Any = unwrapped(module)
    weight = linear.weight
    if is_sharded(weight):
        raise ValueError(_ADAPTED_SHARDS)
    device = weight.device if weight.device.type != "meta" else execution_device(linear)
    if device.type == "meta":
        present(linear, "weight")  # says that there are none
    basis = torch.eye(linear.in_features + 1, linear.in_features, dtype=weight.dtype, device=device)
    modes = [(child, child.training) for child in module.modules()]
    module.eval()  # or LoRA's dropout would take part
    try:
        outputs = module(basis)
    finally:
        for child, training in modes:
            child.training = training
    return (outputs[:-1] - outputs[-1]).T


def added_by_adapters(model: nn.Module, name: str, parameter: str) -> Tensor | None:
    """What PEFT's adapters of whole parameters add to a parameter of a fused experts module while it runs.

    Args:
        model: the model.
        name: of the module, `...experts.base_layer` where PEFT wrapped it.
        parameter: its name in the module.

    Returns:
        The sum of the active adapters, in the parameter's shape, or None if there are none.
    """
    total = None
    while is_wrapped_name(name):
        name = name.rpartition(".")[0]
        wrapper: Any = model.get_submodule(name)
        if getattr(wrapper, "parameter_name", None) != parameter or wrapper.merged or wrapper.disable_adapters:
            continue
        for adapter in wrapper.active_adapters:
            if adapter in wrapper.lora_A:
                if is_sharded(getattr(wrapper.get_base_layer(), parameter)):
                    raise ValueError(_ADAPTED_SHARDS)
                delta = wrapper.get_delta_weight(adapter).detach()
                total = delta if total is None else total + delta
    return total


def present(module: nn.Module, name: str) -> Tensor:
    """A parameter of a module, fetched if accelerate keeps it elsewhere while the module does not run.

    Raises:
        ValueError: if the weights are on the meta device, where there are none.
    """
    weight: Tensor = getattr(module, name)
    if weight.device.type != "meta":
        return weight
    stored = getattr(getattr(module, "_hf_hook", None), "weights_map", None)
    if stored is None:
        raise ValueError(
            "the model's weights are on the meta device, where there are none; load them before anything is fitted"
        )
    fetched: Tensor = stored[name]
    return fetched


def execution_device(model: nn.Module) -> torch.device:
    """The device that a model computes on, also where accelerate keeps its weights elsewhere."""
    devices = [parameter.device for parameter in model.parameters()]
    hooks: list[Any] = [module._hf_hook for module in model.modules() if hasattr(module, "_hf_hook")]
    devices += [torch.device(hook.execution_device) for hook in hooks if getattr(hook, "execution_device", None)]
    return next((device for device in devices if device.type != "meta"), torch.device("meta"))


def fetched(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Tensors of one dtype and dimension on the CPU, waiting once for each device that they are on."""
    found: dict[int, Tensor] = {}
    for device in dict.fromkeys(tensor.device for tensor in tensors):
        there = [index for index, tensor in enumerate(tensors) if tensor.device == device]
        together = torch.cat([tensors[index] for index in there]).cpu()
        found |= dict(zip(there, together.split([len(tensors[index]) for index in there]), strict=True))
    return [found[index] for index in range(len(tensors))]


def write_count(tensor: Tensor) -> int:
    """How often a tensor was written to in place; inference tensors keep no count."""
    return 0 if tensor.is_inference() else tensor._version


def weights_state(module: nn.Module) -> tuple[tuple[int, int], ...]:
    """Where the weights of a module are and how often each was written to; costs no look at them.

    Writes through `.data` are not counted.
    """
    # Packed weights are rewritten while they are used.
    parts = [local_part(p).values for p in module.parameters() if unusable(p) is None]
    return tuple((values.data_ptr(), write_count(values)) for values in parts)


def unusable(weight: Any) -> str | None:
    """Why a weight is no matrix of numbers that a Gaussian can be put over, or None if it is one."""
    if isinstance(weight, Tensor) and is_sharded(weight):
        return sharding_refusal(weight)
    if not isinstance(weight, Tensor) or is_traceable_wrapper_subclass(weight):  # type: ignore[unreachable]
        return f"quantised ({type(weight).__name__})"
    return None if weight.dtype in _FLOATS else f"quantised ({weight.dtype})"


def check_second_weight(name: str, weight: Any) -> None:
    """Refuse second weights that no Gaussian can be put over.

    Raises:
        ValueError: if they are quantised, or sharded.
    """
    reason = unusable(weight)
    if reason is not None:
        raise ValueError(
            f"the second weights of {name!r} are {reason}: the posterior is over weights in float64, float32, bfloat16 "
            "or float16. If they were quantised, keep the experts out of it (most configurations take a list of "
            "modules to skip); other layers may be quantised"
        )


def check_adapter_part(name: str, modules: dict[str, nn.Module]) -> None:
    """Refuse a matrix of LoRA that does not work as a layer of the forward pass.

    Args:
        name: of the layer (`...lora_A.default`, if it is such a matrix).
        modules: all modules of the model by name.

    Raises:
        ValueError: naming the adapter.
    """
    wrapper = modules.get(name.rpartition(".")[0].rpartition(".")[0])
    if not name.rpartition(".")[0].endswith(("lora_A", "lora_B")) or wrapper is None:
        return
    if hasattr(wrapper, "parameter_name"):
        raise ValueError(
            f"{name!r} adapts a whole parameter: PEFT multiplies its matrices and never runs them as layers"
        )
    if getattr(wrapper, "lora_variant", None):
        raise ValueError(
            f"{name!r} belongs to a variant of LoRA (DoRA, say) that runs its matrices on other inputs too"
        )


@contextmanager
def gradients_checked(model: nn.Module) -> Iterator[None]:
    """Watch that quantised layers pass gradients on: one that does not would silently drop a part of them.

    Raises:
        RuntimeError: from within the model, naming the layer.
    """
    with ExitStack() as stack:
        for name, module in model.named_modules():
            if is_linear(module) and unusable(getattr(unwrapped(module), "weight", None)) is not None:
                stack.callback(module.register_forward_hook(_gradient_check(name)).remove)
        yield


def _gradient_check(name: str) -> Any:
    def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        expected = any(isinstance(x, Tensor) and x.requires_grad for x in inputs)
        if torch.is_grad_enabled() and expected and isinstance(output, Tensor) and not output.requires_grad:
            raise RuntimeError(
                f"the quantised layer {name!r} ({type(unwrapped(module)).__name__}) passes no gradient to its input, "
                "so the experts below it cannot be seen; use a quantisation with a backward pass, such as bitsandbytes"
            )

    return hook
