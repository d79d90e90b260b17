"""A rank that fails alone in a pass over data: all ranks raise, and stay in step; real processes, over gloo."""

from __future__ import annotations

import pytest
from forked_processes import run
from oracles.models import answer_logits, split, toy_batch, toy_model

from bmoe_lightning.curvature import checkpoint, collect_factors
from bmoe_lightning.utils.distributed import OtherRankError, gather_number

BATCHES = split(toy_batch(num_rows=20, seed=3), 4, 4, 4, 4, 4)


def collect(class_logits=answer_logits, batches=BATCHES, **options):
    return collect_factors(toy_model(), class_logits, batches, rank=2, sketch="exact", distributed=True, **options)


def failing_at(number, rank):
    """A `class_logits` that fails in its call of that number, on rank 1."""
    calls = []

    def class_logits(model, batch):
        calls.append(batch)
        if rank == 1 and len(calls) == number:
            raise KeyError("no labels")
        return answer_logits(model, batch)

    return class_logits


def assert_raises_on_all(rank, world_size, kind, said, attempt):
    with pytest.raises(kind if rank == 1 else OtherRankError, match=said) as found:
        attempt()
    assert str(found.value).startswith("on rank 1: ") == (rank != 1)
    assert gather_number(rank) == list(range(world_size))


def failing_class_logits(rank, world_size):
    for number in (1, 3, 5):
        assert_raises_on_all(rank, world_size, KeyError, "no labels", lambda n=number: collect(failing_at(n, rank)))
    # One that has fewer batches than the others, and waits for them already.
    fewer = BATCHES[: 2 if rank == 0 else 5]
    assert_raises_on_all(rank, world_size, KeyError, "labels", lambda: collect(failing_at(4, rank), fewer))
    assert collect().num_examples == 20 * world_size


def failing_class_logits_beside_files(rank, world_size, path):
    expected = collect()
    for number in (2, 4):
        assert_raises_on_all(
            rank,
            world_size,
            KeyError,
            "no labels",
            lambda n=number: collect(failing_at(n, rank), checkpoint=path, checkpoint_every=2),
        )
    again = failing_at(0, rank)
    found = collect(again, checkpoint=path)  # from the write after two batches
    assert all((a.slots == b.slots).all() for a, b in zip(found.layers, expected.layers, strict=True))


def full_disk(rank, world_size, path, write):
    """A write of rank 1 that fails: the last one of the pass, or one before."""
    written = []
    original = checkpoint.write_tensor_file

    def writing(*args, **options):
        written.append(args)
        if rank == 1 and len(written) == write:
            raise OSError(28, "No space left on device")
        original(*args, **options)

    checkpoint.write_tensor_file = writing
    assert_raises_on_all(
        rank, world_size, OSError, "No space left", lambda: collect(checkpoint=path, checkpoint_every=2)
    )
    assert collect(checkpoint=path, checkpoint_every=2).num_examples == 20 * world_size  # resumes


def unreadable(rank, world_size, path):
    file = checkpoint.rank_path(path, distributed=True)
    if rank == 1:
        file.write_bytes(b"x")
    assert_raises_on_all(rank, world_size, ValueError, "curvature checkpoint", lambda: collect(checkpoint=path))


@pytest.mark.parametrize("world_size", [2, 3])
def test_class_logits(world_size, tmp_path):
    run(failing_class_logits, world_size, tmp_path)


def test_class_logits_beside_files(tmp_path):
    run(lambda *at: failing_class_logits_beside_files(*at, tmp_path / "sums.safetensors"), 2, tmp_path)


@pytest.mark.parametrize("write", [1, 2, 3])
def test_a_full_disk(write, tmp_path):
    run(lambda *at: full_disk(*at, tmp_path / "sums.safetensors", write), 2, tmp_path)


def test_a_file_that_cannot_be_read(tmp_path):
    run(lambda *at: unreadable(*at, tmp_path / "sums.safetensors"), 2, tmp_path)
