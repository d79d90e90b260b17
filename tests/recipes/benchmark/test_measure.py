"""What is read off timings, on numbers that are known."""

from __future__ import annotations

import gc

import pytest
import torch

from recipes.benchmark.measure import (
    Growth,
    Ratio,
    batch_in_turn,
    growth_exponent,
    peak_megabytes,
    time_inside,
)
from recipes.common.timing import seconds

CPU = torch.device("cpu")


@pytest.mark.parametrize("power", [0.0, 1.0, 1.5])
def test_growth_exponent_of_a_power(power):
    sizes = (8, 16, 64)
    assert growth_exponent(sizes, [3 * size**power for size in sizes]) == pytest.approx(power)
    values = tuple(3 * size**power for size in sizes)
    assert Growth("x", "y", "s", sizes, values, ()).exponent == pytest.approx(power)


def test_growth_exponent_is_that_of_least_squares():
    # log2: (0, 0), (1, 2), (2, 1): slope 1/2.
    assert growth_exponent((1, 2, 4), (1, 4, 2)) == pytest.approx(0.5)


@pytest.mark.parametrize(("sizes", "values"), [((2, 2), (1, 1)), ((1, 2), (0, 1)), ((2,), (1,))])
def test_growth_exponent_refuses_what_has_none(sizes, values):
    with pytest.raises(ValueError, match="growth needs two sizes and values above 0"):
        growth_exponent(sizes, values)


def test_ratio_is_taken_within_each_turn():
    # The second turn is ten times slower for both.
    ratio = Ratio("a / b", (1.0, 30.0, 4.0), (1.0, 10.0, 2.0))
    assert (ratio.spread.median, ratio.spread.low, ratio.spread.high) == (2, 1, 3)


def test_a_batch_is_timed_without_set_up_and_end(clock):
    finished = []

    def consume(batches):
        clock.advance(100)
        for number, batch in enumerate(batches):
            assert batch == "batch"
            clock.advance(50 if number == 0 else number)
        finished.append(True)

    own, others = batch_in_turn(consume, "batch", {"other": lambda: clock.advance(7)}, 3, CPU)
    assert own == (1, 2, 3)
    assert others == {"other": (7, 7, 7)}
    assert not finished


def test_garbage_is_collected_between_timings_and_not_within():
    within = []
    seconds(lambda: within.append(gc.isenabled()), CPU)
    batch_in_turn(lambda batches: [within.append(gc.isenabled()) for _ in batches][:0], "batch", {}, 2, CPU)
    assert within == [False, True, False, False]
    assert gc.isenabled()


def test_what_leaves_batches_is_noticed():
    with pytest.raises(RuntimeError, match="did not ask for all of its batches"):
        batch_in_turn(lambda batches: next(iter(batches)), "batch", {}, 2, CPU)


def test_time_inside_a_method_and_the_method_comes_back(clock):
    class Thing:
        def work(self, by):
            clock.advance(by)

    original = Thing.work
    with time_inside(Thing, "work", CPU) as spent:
        Thing().work(3)
        clock.advance(10)
        Thing().work(by=4)
    assert spent == [3, 4]
    assert Thing.work is original


def test_peak_memory_counts_what_lives_at_once():
    known = torch.zeros(1000)

    def action():
        first = torch.zeros(250_000)
        del first
        second = torch.zeros(500_000)
        return second[:10] + known[:10]

    assert peak_megabytes(action, CPU, [known]) == pytest.approx(2.0, rel=1e-3)
