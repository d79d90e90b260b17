"""One model in several threads: a lock for each model, and hooks that act in one thread only.

Whatever changes a model for a while holds the model's lock. Hooks, taps, dropout and replaced weights act in their own
thread only, so that plain forward passes of other threads without gradients need no lock; modes and `requires_grad`
flags are the model's, so forward passes with gradients do.
"""

from __future__ import annotations

import itertools
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

from torch import nn


class _Lock:
    """A re-entrant lock with a number, the order in which several are acquired."""

    _numbers = itertools.count()

    def __init__(self) -> None:
        self.number = next(self._numbers)
        self.lock = threading.RLock()


# Weak and beside the models: a copy of a model gets its own lock, and state dicts and pickles contain none.
_locks: weakref.WeakKeyDictionary[nn.Module, tuple[_Lock, ...]] = weakref.WeakKeyDictionary()
_registration = threading.Lock()


@contextmanager
def model_lock(model: nn.Module) -> Iterator[None]:
    """Hold the lock of a model: one for each model, re-entrant, held while a prediction or a fit uses the model.

    Models that share modules (a model inside a LightningModule and outside) share the lock. Hold it to change a model
    that other threads predict with: to load weights, to move it, or to copy it. Plain forward passes without
    gradients need no lock.

    Args:
        model: Any module.
    """
    with ExitStack() as stack:
        for lock in _locks_of(model):
            stack.enter_context(lock.lock)
        yield


class _Scope(threading.local):
    everywhere = False


_scope = _Scope()


@contextmanager
def in_all_threads() -> Iterator[None]:
    """Attach to modules within this context what applies in all threads, rather than in this one alone."""
    before, _scope.everywhere = _scope.everywhere, True
    try:
        yield
    finally:
        _scope.everywhere = before


@contextmanager
def attached(model: nn.Module, attach: Callable[[ExitStack], None], *, everywhere: bool) -> Iterator[None]:
    """A context with something attached to a model, in this thread alone, which holds the model's lock meanwhile.

    Or in all threads, which then hold the lock only while it is attached and removed.

    Args:
        model: The model.
        attach: Attaches it, and leaves its removal to the stack.
        everywhere: Whether it applies in all threads.
    """
    with ExitStack() as held, ExitStack() as stack:
        held.enter_context(model_lock(model))
        with in_all_threads() if everywhere else nullcontext():
            attach(stack)
        if everywhere:
            held.close()
        try:
            yield
        finally:
            if everywhere:
                held.enter_context(model_lock(model))


def scope() -> int | None:
    """Identifier of the thread in which something that is attached now applies; None for all threads."""
    return None if _scope.everywhere else threading.get_ident()


def applies(thread: int | None) -> bool:
    """Whether something with that `scope` applies in this thread."""
    return thread is None or thread == threading.get_ident()


def in_this_thread(hook: Callable[..., Any]) -> Callable[..., Any]:
    """A hook that does nothing in other threads than the one that calls this.

    In other threads torch may call a hook with other arguments, since it registers a hook and its flags one by one.
    """
    thread = threading.get_ident()

    def own(*args: Any) -> Any:
        return hook(*args) if threading.get_ident() == thread else None

    return own


def _locks_of(model: nn.Module) -> tuple[_Lock, ...]:
    locks = _locks.get(model)
    # Only children are compared, since a walk over all modules costs more than a lock.
    if locks is None or any(not set(_locks.get(child, (None,))) <= set(locks) for child in model.children()):
        with _registration:
            modules = list(model.modules())
            known = {lock.number: lock for module in modules for lock in _locks.get(module, ())}
            locks = tuple(known[number] for number in sorted(known)) or (_Lock(),)
            for module in modules:
                _locks.setdefault(module, locks)
            _locks[model] = locks
    return locks


def _forget() -> None:
    """Drop all locks in a forked process: a thread that held one does not exist there."""
    global _locks, _registration
    _locks, _registration = weakref.WeakKeyDictionary(), threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
