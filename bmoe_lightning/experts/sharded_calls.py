"""Calls of a model with sharded weights and backward passes through it, which all ranks make together or none.

A rank that fails alone would leave the others waiting in the all-gather of the next module's weights. So ranks agree
before each call of the sharded model, after the last one, before each backward pass and after the last use of its
results. A rank that fails within a call or a backward pass joins its remaining all-gathers first.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bmoe_lightning.experts.fsdp import gathering_outputs, leave_forward, reshard, runs_in_lockstep, sharded_modules
from bmoe_lightning.utils.distributed import OtherRankError, gather_number, tell_all_ranks

_CALL, _END = 1, 2


@contextmanager
def called_together(model: Any) -> Iterator[None]:
    """Run a block that calls a model; if its weights are sharded and the block fails on any rank, all ranks raise.

    A collective, if the weights are sharded.

    Args:
        model: The model.

    Raises:
        OtherRankError: If the block raises on another rank; on that rank its exception is raised.
        ValueError: If ranks call the model differently often; raised on all ranks.
    """
    if not isinstance(model, nn.Module) or not runs_in_lockstep(model):
        yield
        return
    calls = _Calls()
    with ExitStack() as stack:
        for module in sharded_modules(model):
            # Before FSDP2's own hook, which all-gathers the weights.
            stack.callback(module.register_forward_pre_hook(calls.begin, prepend=True).remove)
            stack.callback(module.register_forward_hook(partial(calls.end, module)).remove)
        try:
            yield
            _agree(_END)
        except Exception as error:
            if not isinstance(error, OtherRankError):
                calls.finish()
            tell_all_ranks(error)
            leave_forward(model)
            reshard(model)  # ranks may have reached different modules
            raise


class _Calls:
    """The call of the model that is running: an outermost sharded module, and the modules within that have begun."""

    def __init__(self) -> None:
        self._outermost: nn.Module | None = None
        self._begun: set[nn.Module] = set()

    def begin(self, module: nn.Module, _args: Any) -> None:
        if self._outermost is None:
            _agree(_CALL)
            self._outermost, self._begun = module, set()
        self._begun.add(module)

    def end(self, module: nn.Module, *_: Any) -> None:
        if module is self._outermost:
            self._outermost = None

    def finish(self) -> None:
        """All-gather what is left of a call that failed; modules are called in the order in which they are defined."""
        if self._outermost is None:
            return
        for module in sharded_modules(self._outermost):
            if module not in self._begun:
                module.unshard()


class BackwardPasses:
    """The backward passes through one forward pass of a sharded model: each is a collective."""

    def __init__(self) -> None:
        self._called: list[Any] = []
        self._begun: set[int] = set()

    @contextmanager
    def through(self, model: nn.Module) -> Iterator[None]:
        """Run the forward pass of a model within this context."""
        with ExitStack() as stack:
            for module in sharded_modules(model):
                stack.callback(module.register_forward_hook(self._record).remove)
            yield

    @property
    def num_calls(self) -> int:
        """Number of calls of sharded modules that have ended in the forward pass."""
        return len(self._called)

    @contextmanager
    def together(self, first: int) -> Iterator[None]:
        """Run one backward pass. A collective; on a rank that fails within, the remaining all-gathers are made.

        Args:
            first: `num_calls` when the first tensor that is differentiated with respect to was computed: the backward
                pass does not reach earlier calls.

        Raises:
            OtherRankError: If another rank fails before it, or failed in the last one.
        """
        gather_number(0)
        self._begun = set()
        try:
            yield
        except Exception:
            for index in reversed(range(first, len(self._called))):
                if index not in self._begun:
                    self._called[index].unshard()
                    self._called[index].reshard()  # it may have been called several times
            raise

    def _record(self, module: nn.Module, _args: Any, output: Any) -> None:
        tensors = gathering_outputs(output) if torch.is_grad_enabled() else ()
        if not tensors:
            return
        begin = partial(self._begin, len(self._called))
        self._called.append(module)
        for tensor in tensors:
            tensor.register_hook(begin)

    def _begin(self, index: int, _gradient: Tensor) -> None:
        self._begun.add(index)


def _agree(event: int) -> None:
    if len(set(gather_number(event))) > 1:
        raise ValueError(
            "class_logits calls the model more often on some ranks than on others, but they all-gather sharded weights "
            "in lockstep: call it equally often for every batch"
        )
