"""Replacement of router logits while a model runs, in the same way for every family.

A router computes its logits by one call of `torch.nn.functional.linear`. While the router runs, the result of that call
is replaced; what the family does with logits (scores, biases, groups, top K, weights) stays its own code. No module is
exchanged, and no weight.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from bmoe_lightning.experts.threads import applies, attached, scope
from bmoe_lightning.experts.tied_weights import parameter_owners
from bmoe_lightning.experts.wrappers.compiled import eager_code, is_compiled
from bmoe_lightning.experts.wrappers.names import unwrapped
from bmoe_lightning.routers.structure import is_plain_linear, linear_maps, plain_linears
from bmoe_lightning.routers.types import Replace, Router


@contextmanager
def intercepted_routers(
    model: nn.Module, routers: Sequence[Router], replace: Replace, *, everywhere: bool = False
) -> Iterator[None]:
    """Replace the logits of routers by `replace(router, u, logits)` while a model runs.

    `u [tokens, D]` is the input of the router's linear map and `logits [tokens, N]` its result, in the order of the
    model's flattened tokens, padding among them, and in the dtype in which the family computes them: sample in float32
    and cast back, since other dtypes would change those of the experts' weights. If the logits come back as they are,
    the model computes bitwise what it does without this context. Gradients pass through what is returned.

    Of nested contexts, the inner one gets what the outer one returned. A router that runs again, because activations
    are recomputed for gradients, is replaced again and must get the same logits: let random numbers depend on the
    position of the call (see `bmoe_lightning.routers.streams`), and never on how often `replace` was called.

    The model is restored afterwards, also after an exception. Code that torch.compile compiled runs eagerly meanwhile.

    Args:
        model: The model.
        routers: Some of its routers.
        replace: The function.
        everywhere: Whether this applies in all threads, for training, where backward passes that recompute activations
            may run in another one. Otherwise it applies in this thread alone, which holds the model's lock meanwhile.

    Raises:
        ValueError: If the model is compiled and this should apply everywhere.
        RouterError: If a router makes its logits by no linear map or by several; raised from within the model.
        RuntimeError: If `replace` returns another shape or dtype; raised from within the model.
    """
    if everywhere and is_compiled(model):
        raise ValueError(
            "routers are intercepted through forward hooks, which compiled code skips: train this model without "
            "torch.compile"
        )

    def attach(stack: ExitStack) -> None:
        if not everywhere:
            stack.enter_context(eager_code())
        owners = parameter_owners(model)
        for router in routers:
            for module in tied_routers(model, router, owners):
                interception = _Interception(router, replace)
                stack.callback(interception.end)
                interception.attach(stack, module)

    with attached(model, attach, everywhere=everywhere):
        yield


def tied_routers(model: nn.Module, router: Router, owners: Counter[int]) -> list[nn.Module]:
    """The modules that are a router: its own, and those of the same class with the same weights.

    Args:
        model: The model.
        router: One of its routers.
        owners: The counts of `parameter_owners(model)`.
    """
    module = model.get_submodule(router.name)
    own = {id(parameter) for parameter in module.parameters()}
    if all(owners[parameter] == 1 for parameter in own):
        return [module]
    others = (other for other in model.modules() if type(other) is type(module) and other is not module)
    return [module, *(other for other in others if {id(parameter) for parameter in other.parameters()} == own)]


class RouterError(RuntimeError):
    """A router that makes its logits by no linear map, or by several.

    Attributes:
        router: The router.
    """

    def __init__(self, router: Router, module: nn.Module, count: int) -> None:
        super().__init__(
            f"the router {router.name!r} ({type(unwrapped(module)).__name__}) made its logits by {count or 'no'} calls "
            f"of torch.nn.functional.linear with {router.num_experts} outputs; a router is supported if it makes them "
            "by exactly one"
        )
        self.router = router


class _Interception:
    """The replacement of one router's logits, for as long as a context lasts."""

    def __init__(self, router: Router, replace: Replace) -> None:
        self._router, self._replace = router, replace
        self._thread = scope()
        self._active = True
        self._calls = _Calls()

    def end(self) -> None:
        """Replace nothing any more: a copy of the model, made meanwhile, has copies of the hooks."""
        self._active = False
        while self._calls.open:  # torch calls no hook after a KeyboardInterrupt
            self._calls.open.pop().__exit__(None, None, None)

    def attach(self, stack: ExitStack, module: nn.Module) -> None:
        """Hook into a module of the router until a stack is closed."""
        # Plain functions, which a copy of the model shares; a copy of a bound method would copy this object.
        if is_plain_linear(module):
            stack.callback(module.register_forward_hook(self._replaced_output(), with_kwargs=True).remove)
            return
        shape = self._router.num_experts, self._router.d_in
        for linear in plain_linears(module):
            if shape in linear_maps(linear):
                # An adapter adds to the result of the linear map, so what the layer returns is replaced.
                stack.callback(linear.register_forward_pre_hook(self._enter_linear()).remove)
                leave = linear.register_forward_hook(self._leave_linear(), with_kwargs=True, always_call=True)
                stack.callback(leave.remove)
        stack.callback(module.register_forward_pre_hook(self._enter()).remove)
        stack.callback(module.register_forward_hook(self._leave(), prepend=True, always_call=True).remove)

    def replaced(self, inputs: Tensor, logits: Tensor) -> Tensor:
        """The logits that the model continues with, for `inputs [..., D]` and `logits [..., N]`."""
        flat = logits.reshape(-1, logits.shape[-1])
        found = self._replace(self._router, inputs.reshape(-1, inputs.shape[-1]), flat)
        if found is flat:
            return logits
        if found.shape != flat.shape or found.dtype != flat.dtype:
            raise RuntimeError(
                f"the logits of the router {self._router.name!r} were replaced by {found.dtype} {tuple(found.shape)}, "
                f"and it gave {flat.dtype} {tuple(flat.shape)}; return the same shape and dtype"
            )
        return found.view(logits.shape) if found.is_contiguous() else found.reshape(logits.shape)

    @property
    def _applies(self) -> bool:
        return self._active and applies(self._thread)

    def _replaced_output(self) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], *rest: Any) -> Tensor | None:
            if not self._applies:
                return None
            kwargs, output = rest
            return self.replaced(_input(args, kwargs), output)

        return hook

    def _enter(self) -> Any:
        def hook(_module: nn.Module, _args: Any) -> None:
            if self._applies:
                call = _Call(self, (self._router.num_experts, self._router.d_in))
                self._calls.open.append(call)
                call.__enter__()

        return hook

    def _leave(self) -> Any:
        def hook(module: nn.Module, _args: Any, output: Any) -> None:
            # Also after an exception: of a hook before `_enter`, or because a recomputation stops early.
            if not self._applies or not self._calls.open:
                return
            call = self._calls.open.pop()
            call.__exit__(None, None, None)
            if output is not None and call.count != 1:
                raise RouterError(self._router, module, call.count)

        return hook

    def _enter_linear(self) -> Any:
        def hook(_module: nn.Module, _args: Any) -> None:
            if self._applies and self._calls.open:
                self._calls.open[-1].in_linear += 1

        return hook

    def _leave_linear(self) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], *rest: Any) -> Tensor | None:
            if not self._applies or not self._calls.open:
                return None
            kwargs, output = rest
            call = self._calls.open[-1]
            call.in_linear -= 1
            if output is None:
                return None
            call.count += 1
            return self.replaced(_input(args, kwargs), output)

        return hook


class _Calls(threading.local):
    """The calls of a router that are running in a thread, the innermost last."""

    def __init__(self) -> None:
        self.open: list[_Call] = []


class _Call(TorchFunctionMode):
    """One call of a router, in which the result of its linear map is replaced.

    Attributes:
        count: Number of results that were replaced.
        in_linear: Number of linear layers that are running, whose output is replaced instead.
    """

    def __init__(self, interception: _Interception, shape: tuple[int, int]) -> None:
        super().__init__()
        self.count, self.in_linear = 0, 0
        self._interception, self._shape = interception, shape

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if func is not nn.functional.linear or self.in_linear:
            return output
        weight = args[1] if len(args) > 1 else kwargs["weight"]
        if tuple(weight.shape) != self._shape:
            return output
        self.count += 1
        return self._interception.replaced(_input(args, kwargs), output)


def _input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    x: Tensor = args[0] if args else kwargs["input"]
    return x
