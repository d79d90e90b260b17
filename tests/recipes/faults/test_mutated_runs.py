"""A finished run with a damaged file: what counts as refused, repaired, without effect, and as a fault."""

from __future__ import annotations

import pytest

from bmoe_lightning.utils.file_header import DamagedFileError
from recipes.faults import mutated_runs
from recipes.faults.forked import Ended
from recipes.faults.trials import Undisturbed


class Finished:
    """A subject whose runs end in a given way."""

    def __init__(self, status=0, text="", differences=(), numbers="same"):
        self.ended, self.found, self.value = Ended(status, text), differences, numbers

    def run(self, _folder):
        return self.ended

    def differences(self, _folder, _expected):
        if isinstance(self.found, Exception):
            raise self.found
        return list(self.found)

    def numbers(self, _folder):
        return {"results": self.value}


def outcome(tmp_path, **how):
    run = Undisturbed(Finished(**how), tmp_path, 0, {"results": "same"})
    return mutated_runs._outcome(run, tmp_path, tmp_path / "trained.safetensors")


def test_what_counts(tmp_path):
    unread = DamagedFileError(f"{tmp_path / 'trained.safetensors'} is damaged")
    assert outcome(tmp_path) == ("no effect", "")
    assert outcome(tmp_path, text="fitted again") == ("repaired", "")
    assert outcome(tmp_path, status=1, text=f"error: {tmp_path} is damaged") == ("refused", "")
    assert outcome(tmp_path, text="drawn again", differences=unread) == ("no effect", "")
    for how in (
        {"differences": ["results"]},
        {"differences": unread, "numbers": "other"},
        {"status": 1, "text": "Traceback"},
        {"status": 1, "text": "error: something"},
    ):
        assert outcome(tmp_path, **how)[1]


def test_another_damaged_file_is_no_outcome(tmp_path):
    with pytest.raises(DamagedFileError):
        outcome(tmp_path, differences=DamagedFileError("other.safetensors is damaged"))
