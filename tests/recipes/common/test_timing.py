"""Interleaved timings, with a clock that only actions move."""

from __future__ import annotations

import gc

import torch

from recipes.common.timing import in_turn, seconds, without_garbage_collection

CPU = torch.device("cpu")


def test_actions_take_turns_after_a_warm_up(clock):
    order = []

    def action(name, duration):
        def run():
            order.append(name)
            clock.advance(duration)

        return run

    times = in_turn({"a": action("a", 2), "b": action("b", 5)}, 3, CPU)
    assert order == ["a", "b"] * 4
    assert times == {"a": (2, 2, 2), "b": (5, 5, 5)}


def test_without_a_warm_up_the_first_run_is_timed(clock):
    order = []
    times = in_turn({"a": lambda: order.append(clock.advance(1))}, 2, CPU, warm_up=False)
    assert len(order) == 2
    assert times == {"a": (1, 1)}


def test_garbage_is_collected_once_around_several_timings(monkeypatch):
    collected, within = [], []
    monkeypatch.setattr(gc, "collect", lambda: collected.append(True))
    with without_garbage_collection():
        for _ in range(3):
            seconds(lambda: within.append(gc.isenabled()), CPU)
    assert (collected, within) == ([True], [False] * 3)
    assert gc.isenabled()
