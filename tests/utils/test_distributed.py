"""Sums and gathers between real processes, over gloo."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from forked_processes import run
from oracles.models import answer_logits, toy_model

from bmoe_lightning.methods import Method, fit_methods
from bmoe_lightning.methods.fitting import _check_same
from bmoe_lightning.utils import distributed as processes
from bmoe_lightning.utils.distributed import (
    OtherRankError,
    barrier,
    broadcast_,
    failing_together,
    gather_examples,
    gather_number,
    is_rank_zero,
    num_processes,
    process_rank,
    sequential_per_node,
    shard_size,
    sum_over_processes,
    together,
)
from bmoe_lightning.utils.random_state import forked_random_state


def adding(rank, world_size):
    assert (num_processes(), process_rank(), is_rank_zero()) == (world_size, rank, rank == 0)
    total = sum(range(1, world_size + 1))
    processes._BUCKET = 8  # so that some tensors travel together, and one alone
    large = torch.full((3, 4), rank + 1.0)
    strided = torch.full((4, 2), rank + 1.0, dtype=torch.float64).T
    scalar, count, empty = torch.tensor(rank + 1.0), torch.tensor([rank + 1]), torch.empty(0)
    sum_over_processes([scalar, large, strided, count, empty, torch.zeros(5)])
    assert scalar == total
    assert count.dtype == torch.int64
    assert count.tolist() == [total]
    assert torch.equal(large, torch.full((3, 4), float(total)))
    assert torch.equal(strided, torch.full((2, 4), float(total), dtype=torch.float64))


def copying(rank, world_size):
    tensors = [torch.full((2, 3), rank + 0.1, dtype=torch.float64), torch.tensor(rank), torch.ones(2, 2).T * rank]
    broadcast_(tensors)
    assert torch.equal(tensors[0], torch.full((2, 3), 0.1, dtype=torch.float64))
    assert tensors[1] == 0
    assert not tensors[2].any()
    barrier()


def gathering(rank, world_size):
    for total in (0, 1, 2, 3, 7, 12):
        whole = torch.arange(total * 6, dtype=torch.float64).view(total, 2, 3)
        own = whole[rank::world_size]
        own = own if len(own) else torch.empty(0, dtype=torch.float64)  # knows no other size
        found = gather_examples(own)
        assert torch.equal(found, whole if total else torch.empty(0, dtype=torch.float64)), total
        assert torch.equal(gather_examples(torch.arange(total)[rank::world_size]), torch.arange(total))


def refusing(rank, world_size):
    with pytest.raises(ValueError, match=r"have \[2, 0\] examples"):
        gather_examples(torch.zeros(2 - 2 * rank))
    with pytest.raises(ValueError, match="different sizes"):
        gather_examples(torch.zeros(1, 2 + rank))


@dataclass(frozen=True)
class OfRank(Method):
    """Is fitted to something else on each rank."""

    name: str = "of_rank"
    label: str = "Of the rank"

    def fit(self, work):
        rank = process_rank()
        vector = torch.tensor([1 / 3 + rank, 2.0], dtype=torch.float64)
        return {"scalar": torch.tensor(0.1 + rank, dtype=torch.float64), "vector": vector}

    def log_probs(self, batch, state):
        raise NotImplementedError


def agreeing(rank, world_size):
    _check_same("00ff" * 16)
    with pytest.raises(ValueError, match=f"weights on 1 of {world_size} ranks"):
        _check_same("00ff" * 15 + ("00ff" if rank != 1 else "00fe"))


def fitting(rank, world_size):
    model = toy_model()
    fit = fit_methods([OfRank()], model, answer_logits, [], distributed=True)
    state = fit.state_of(OfRank())
    assert state["scalar"] == torch.tensor(0.1, dtype=torch.float64)
    assert state["vector"].tolist() == [1 / 3, 2.0]
    alone = fit_methods([OfRank()], model, answer_logits, []).state_of(OfRank())
    assert alone["vector"].tolist() == [1 / 3 + rank, 2.0]
    with torch.no_grad():
        model.layers[0].mixture.crew.down_proj[-1, -1, -1] += rank == 1
    with pytest.raises(ValueError, match=f"weights on 1 of {world_size} ranks"):
        fit_methods([OfRank()], model, answer_logits, [], distributed=True)


def taking_turns(rank, world_size):
    log = Path(os.environ["TURNS"])

    def write():
        for _ in range(20):
            with log.open("a") as file:
                file.write(f"{rank}\n")
            time.sleep(0.002)
        return rank

    assert sequential_per_node(write) == rank
    barrier()
    assert log.read_text().split() == [str(r) for r in range(world_size) for _ in range(20)]


def failing_in_turn(rank, world_size):
    for failing in range(world_size):
        tried = []

        def action(failing=failing, tried=tried):
            tried.append(rank)
            if rank == failing:
                raise KeyError("mine")

        with pytest.raises(KeyError if rank == failing else OtherRankError) as said:
            sequential_per_node(action)
        assert str(said.value) == "'mine'" if rank == failing else f"on rank {failing}: KeyError: 'mine'"
        assert tried == [rank] * (rank <= failing)  # nobody begins after that


def failing_at_once(rank, world_size):
    for failing in range(world_size):

        def action(failing=failing):
            if rank == failing:
                raise OSError("disk full")
            return rank

        with pytest.raises(OSError if rank == failing else OtherRankError) as said:
            together(action)
        assert str(said.value) == ("disk full" if rank == failing else f"on rank {failing}: OSError: disk full")
        if rank == failing:
            with pytest.raises(OSError, match="disk full"):
                together(action, distributed=False)  # no collective
        barrier()
    assert together(lambda: rank) == rank


def failing_in_a_block(rank, world_size):
    """The others are told in the middle of the block, where blocks are nested, and where two ranks fail at once."""
    reached = []

    def nested(failing):
        with failing_together(), failing_together():
            for number in range(3):
                if (rank, number) == (failing, 1):
                    raise OSError("disk full")
                reached.append(gather_number(number)[0])
            barrier()  # nobody comes here

    def raising(error, *ranks, distributed=True):
        with failing_together(distributed=distributed):
            if rank in ranks:
                raise error

    for failing in range(world_size):
        reached.clear()
        with pytest.raises(OSError if rank == failing else OtherRankError, match="disk full"):
            nested(failing)
        assert reached == [0]
        barrier()
    with pytest.raises(KeyError if rank else OtherRankError, match=f"of rank {max(rank, 1)}"):
        raising(KeyError(f"of rank {rank}"), *range(1, world_size))
    if rank:
        with pytest.raises(OSError, match="alone"):
            raising(OSError("alone"), rank, distributed=False)  # no collective
    long = "x" * 5000
    with pytest.raises(ValueError if rank == 0 else OtherRankError, match="xxx") as said:
        raising(ValueError(long), 0)
    assert str(said.value) == (long if rank == 0 else f"on rank 0: ValueError: {long[:1988]}")
    assert gather_number(rank) == list(range(world_size))


def taking_turns_on_two_machines(rank, world_size):
    processes.socket.gethostname = lambda: f"machine-{rank % 2}"
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    number = torch.tensor(10 ** (rank % 2))
    # Hangs unless the first process of either machine has its turn together with that of the other.
    sequential_per_node(lambda: dist.all_reduce(number, group=pairs[rank // 2]))
    assert number == 11


def telling(rank, world_size):
    assert gather_number(10 * rank - 1) == [10 * r - 1 for r in range(world_size)]


def forking(rank, world_size):
    before = torch.get_rng_state()
    with forked_random_state():
        torch.rand(3)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize(
    "function",
    [
        agreeing,
        fitting,
        failing_in_turn,
        failing_at_once,
        failing_in_a_block,
        forking,
        adding,
        telling,
        copying,
        gathering,
    ],
)
def test_between_processes(function, world_size, tmp_path):
    run(function, world_size, tmp_path)


@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_take_turns(world_size, tmp_path, monkeypatch):
    monkeypatch.setenv("TURNS", str(tmp_path / "turns"))
    run(taking_turns, world_size, tmp_path)


def test_each_machine_has_turns_of_its_own(tmp_path):
    run(taking_turns_on_two_machines, 4, tmp_path)


def test_refuses_what_is_not_dealt_out_in_turn(tmp_path):
    run(refusing, 2, tmp_path)


def test_a_failing_process_fails_the_test(tmp_path):
    def failing(rank, world_size):
        assert rank == 0, "as it should"

    with pytest.raises(AssertionError, match="as it should"):
        run(failing, 2, tmp_path)


def test_one_process_has_everything():
    assert (num_processes(), process_rank(), is_rank_zero()) == (1, 0, True)
    values = torch.tensor([1.0, 2.0])
    sum_over_processes([values])
    broadcast_([values])
    barrier()
    assert sequential_per_node(lambda: 5) == together(lambda: 5) == 5
    with pytest.raises(KeyError):
        sequential_per_node(lambda: {}[0])
    assert gather_number(7) == [7]
    assert gather_examples(values) is values
    assert values.tolist() == [1.0, 2.0]


def test_shares_add_up():
    for total in range(8):
        sizes = [shard_size(total, rank, 3) for rank in range(3)]
        assert sizes == [len(list(range(total))[rank::3]) for rank in range(3)]
        assert sum(sizes) == total
