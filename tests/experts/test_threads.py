"""The lock of a model, and hooks of one thread."""

from __future__ import annotations

import copy
import gc
import os
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from bmoe_lightning.experts import threads
from bmoe_lightning.experts.threads import applies, in_all_threads, in_this_thread, model_lock, scope


def is_free(model):
    """Whether another thread gets the lock."""
    with ThreadPoolExecutor(1) as other:
        return other.submit(_acquire, model).result()


def _acquire(model):
    locks = [lock.lock for lock in threads._locks_of(model)]
    taken = [lock for lock in locks if lock.acquire(blocking=False)]
    for lock in taken:
        lock.release()
    return len(taken) == len(locks)


def test_is_re_entrant_and_released_after_an_exception():
    model = nn.Linear(2, 2)
    with model_lock(model):
        with pytest.raises(ZeroDivisionError), model_lock(model):
            raise ZeroDivisionError
        assert not is_free(model)
    assert is_free(model)


def test_a_model_inside_and_outside_another_one_has_one_lock():
    inner = nn.Sequential(nn.Linear(2, 2))
    with model_lock(inner):
        assert not is_free(nn.Sequential(inner))
        assert not is_free(inner[0])
        assert is_free(nn.Linear(2, 2))
    outer = nn.Module()
    assert is_free(outer)
    outer.late = inner  # added after the outer one had a lock
    with model_lock(inner):
        assert not is_free(outer)
    with model_lock(outer):
        assert not is_free(inner)


def test_two_models_that_are_joined_later():
    one, two = nn.Linear(2, 2), nn.Linear(2, 2)
    assert is_free(one)
    assert is_free(two)
    with model_lock(nn.ModuleList([two, one])):
        assert not is_free(one)
        assert not is_free(two)


def test_copies_have_their_own_lock_and_nothing_is_stored():
    model = nn.Linear(2, 2)
    before = set(vars(model))
    with model_lock(model):
        assert is_free(copy.deepcopy(model))
        assert is_free(pickle.loads(pickle.dumps(model)))
    assert set(vars(model)) == before
    assert set(model.state_dict()) == {"weight", "bias"}


def test_locks_end_with_their_models():
    gc.collect()  # of other tests' models
    count = len(threads._locks)
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    with model_lock(model):
        assert len(threads._locks) == count + 3
    del model
    gc.collect()
    assert len(threads._locks) == count


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_forked_process_does_not_wait_for_a_thread_that_it_lacks():
    model = nn.Linear(2, 2)
    with model_lock(model):
        child = os.fork()
        if not child:
            os._exit(0 if is_free(model) else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert not is_free(model)


def test_hooks_of_one_thread():
    calls = []
    hook = in_this_thread(lambda *args: calls.append(args) or 7)
    with ThreadPoolExecutor(1) as other:
        assert hook(1, 2) == 7
        assert other.submit(hook, 1).result() is None
        here = scope()
        assert applies(here)
        assert not other.submit(applies, here).result()
        with in_all_threads():
            assert scope() is None
            assert other.submit(scope).result() is not None
        assert other.submit(applies, None).result()
    assert calls == [(1, 2)]


def test_torch_calls_hooks_for_a_moment_without_their_keyword_arguments():
    """Why hooks of other threads must take any arguments: torch sets the flag after it has added the hook."""
    linear = nn.Linear(2, 2)
    handle = linear.register_forward_pre_hook(in_this_thread(lambda module, args, kwargs: None), with_kwargs=True)
    linear._forward_pre_hooks_with_kwargs.clear()
    with ThreadPoolExecutor(1) as other:
        other.submit(linear, torch.ones(1, 2)).result()
    handle.remove()
