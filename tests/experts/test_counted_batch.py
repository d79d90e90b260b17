"""Examples that run and are not counted."""

from __future__ import annotations

import pytest
from torch import nn

from bmoe_lightning.experts import counted_batch
from bmoe_lightning.experts.counted_batch import CountedBatch, check_entries, count_of, lockstep, plain_batch


def test_counts():
    assert plain_batch(CountedBatch("batch", 2, 3)) == plain_batch("batch") == "batch"
    assert count_of(CountedBatch("batch", 3, 3), 6) == count_of("batch", 6) == 6
    assert count_of(CountedBatch("batch", 1, 3), 3) == 1
    check_entries(3, 3)
    with pytest.raises(ValueError, match="6 examples for 3 entries"):
        count_of(CountedBatch("batch", 2, 3), 6)


class TestLockstep:
    def of_two(self, monkeypatch, others):
        """Another process that has as many batches."""
        monkeypatch.setattr(counted_batch, "runs_in_lockstep", lambda model: True)
        left = iter([1] * others + [0] * 10)
        monkeypatch.setattr(counted_batch, "gather_number", lambda number: [number, next(left)])

    def test_alone(self):
        assert list(lockstep(nn.Linear(1, 1), iter("abc"))) == ["a", "b", "c"]

    def test_equally_many(self, monkeypatch):
        self.of_two(monkeypatch, 3)
        assert list(lockstep(nn.Linear(1, 1), "abc")) == ["a", "b", "c"]

    @pytest.mark.parametrize("others", [2, 4])
    def test_more_or_fewer(self, monkeypatch, others):
        self.of_two(monkeypatch, others)
        seen = []
        with pytest.raises(ValueError, match=r"1 of 2 processes have a batch left .*in lockstep"):
            seen.extend(lockstep(nn.Linear(1, 1), "abc"))
        assert len(seen) <= 3
