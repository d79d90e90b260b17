"""What a checkpoint says of its run, however damaged."""

from __future__ import annotations

from pathlib import Path

import pytest

from bmoe_lightning.methods import FitResult
from bmoe_lightning.methods.storage import save_fit
from bmoe_lightning.trainer.earlier_run import EarlierRun, pass_files, possible_homes

ID = "0123456789abcdef" * 2


def test_comes_back_as_it_was():
    state = {"folder": "/runs/one", "fit": ID, "snapshots": ["a", "b"]}
    assert EarlierRun.of_state(state) == EarlierRun(Path("/runs/one"), ID, ("a", "b"))
    assert EarlierRun.of_state({"folder": None, "fit": ID, "snapshots": []}) is None
    assert EarlierRun.of_state({}) is None


@pytest.mark.parametrize("fit", ["../../x", "", 5, None, ID.upper(), ID + "0"])
def test_what_is_no_id_is_ignored(fit):
    assert EarlierRun.of_state({"folder": "x", "fit": fit}).fit_id == ""


@pytest.mark.parametrize(
    "state", [{"folder": 5}, {"folder": ["x"]}, {"folder": "x", "snapshots": 3}, [1], None, "x", {"folder": "a\0b"}]
)
def test_a_damaged_state_is_one_sentence(state):
    with pytest.raises(ValueError, match=r"state of BayesianMoECallback is damaged \(.*\); load another checkpoint"):
        EarlierRun.of_state(state)


def test_the_home_that_has_files_of_the_fit_is_first(tmp_path):
    saved = tmp_path / "run" / "checkpoints" / "last.ckpt"
    moved = tmp_path / "run" / "bayesian_moe"
    save_fit(moved, FitResult(fit_id=ID))
    earlier = EarlierRun(tmp_path / "old" / "bayesian_moe", ID, ())
    assert possible_homes(earlier, saved)[:2] == [moved, earlier.folder]
    other = EarlierRun(earlier.folder, "f" * 32, ())
    assert possible_homes(other, saved)[:2] == [earlier.folder, moved]
    assert possible_homes(earlier, None) == [earlier.folder]
    assert possible_homes(None, saved) == [moved, saved.parent]
    assert possible_homes(None, None) == []


def test_the_files_of_curvature_passes(tmp_path):
    for name in ("curvature_state-01234567-aa.safetensors", ".curvature_state-01234567-bb-rank0of2.safetensors.tmp"):
        (tmp_path / name).write_text("")
    (tmp_path / "curvature_state-76543210-cc.safetensors").write_text("")
    assert {path.name for path in pass_files(tmp_path, ID)} == {
        "curvature_state-01234567-aa.safetensors", "curvature_state-01234567-bb.safetensors",
    }  # fmt: skip
    assert pass_files(tmp_path, "") == set()
    for name in ("missing", "x" * 5000):
        assert pass_files(tmp_path / name, ID) == set()
