"""What was fitted, on disk: it comes back whole or not at all."""

from __future__ import annotations

import json
import os
import stat
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from oracles.models import answer_logits, split, toy_batch, toy_model

from bmoe_lightning.laplace import LaplacePosterior
from bmoe_lightning.methods import save_snapshot
from bmoe_lightning.methods.options import FitSettings, FittedState
from bmoe_lightning.methods.storage import POSTERIOR_FILE, STATE_FILE, has_fitted, load_fitted, save_fitted, write_text
from bmoe_lightning.methods.workbench import Fitted, fit

STATE = FittedState(1.5, 2.0, 1.7, 0.9, (0.5, 1 / 3), (4.0, 4.0))


def posterior_of(seed):
    model = toy_model(seed)
    settings = FitSettings(("laplace_evidence",), rank=2, prior_mean="zero")
    return fit(model, answer_logits, settings, split(toy_batch(20), 10, 10), None).posterior


@pytest.fixture(scope="module")
def fitted():
    return Fitted(STATE, posterior_of(0))


@pytest.fixture
def folder(fitted, tmp_path):
    """A folder as it is written, with two snapshots."""
    snapshots = [tmp_path / "snapshots" / name for name in ("epoch-9.safetensors", "epoch-10.safetensors")]
    for path in snapshots:
        save_snapshot(path, {"weight": torch.ones(2)})
    save_fitted(tmp_path, fitted, snapshots)
    return tmp_path


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def changed(folder, **entries):
    path = folder / STATE_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


class TestRoundTrip:
    def test_state_posterior_and_snapshots_in_their_order(self, folder, fitted):
        loaded, snapshots = load_fitted(folder)
        assert loaded.state == STATE
        assert loaded.posterior.factors.fingerprint == fitted.posterior.factors.fingerprint
        assert torch.equal(loaded.posterior.prior_precision, fitted.posterior.prior_precision)
        assert torch.equal(loaded.posterior.factors.layers[1].a_basis, fitted.posterior.factors.layers[1].a_basis)
        assert [path.name for path in snapshots] == ["epoch-9.safetensors", "epoch-10.safetensors"]
        assert all(path.is_file() for path in snapshots)

    def test_without_a_posterior(self, tmp_path):
        save_fitted(tmp_path / "made" / "here", Fitted(FittedState(temperature=2.5)))
        loaded, snapshots = load_fitted(tmp_path / "made" / "here")
        assert loaded == Fitted(FittedState(temperature=2.5))
        assert snapshots == []
        assert list(files(tmp_path)) == [f"made/here/{STATE_FILE}"]

    def test_an_earlier_posterior_is_not_taken_for_this_fit_s(self, folder):
        save_fitted(folder, Fitted(FittedState(temperature=2.5)))
        assert load_fitted(folder)[0] == Fitted(FittedState(temperature=2.5))

    def test_the_folder_can_be_moved(self, folder, tmp_path_factory):
        moved = tmp_path_factory.mktemp("moved") / "there"
        folder.replace(moved)
        loaded, snapshots = load_fitted(moved)
        assert loaded.state == STATE
        assert [path.parent.parent for path in snapshots] == [moved, moved]

    def test_writing_again_replaces(self, folder, fitted):
        save_fitted(folder, replace(fitted, state=FittedState(temperature=3.0)))
        loaded, snapshots = load_fitted(folder)
        assert loaded.state == FittedState(temperature=3.0)
        assert snapshots == []

    def test_has_fitted(self, folder, tmp_path_factory):
        assert has_fitted(folder)
        (folder / STATE_FILE).unlink()
        assert not has_fitted(folder)  # a posterior alone is a fit that was cut off
        assert not has_fitted(folder / "nowhere")

    def test_snapshots_elsewhere_are_refused(self, tmp_path, fitted):
        with pytest.raises(ValueError, match="elsewhere"):
            save_fitted(tmp_path / "here", fitted, [tmp_path / "elsewhere" / "epoch-1.safetensors"])
        assert not has_fitted(tmp_path / "here")

    def test_others_may_read_what_the_umask_lets_them(self, folder):
        old = os.umask(0o027)
        try:
            save_fitted(folder, Fitted(FittedState(temperature=2.5), posterior_of(0)))
        finally:
            os.umask(old)
        for name in (STATE_FILE, POSTERIOR_FILE):
            assert stat.S_IMODE((folder / name).stat().st_mode) == 0o640


class TestRefusals:
    @pytest.mark.parametrize("content", ["", "{", '{"version": 1', "no JSON", '"fitted"', "[]", "3", "null", "{}"])
    def test_no_description(self, folder, content):
        (folder / STATE_FILE).write_text(content)
        with pytest.raises(ValueError, match=rf"{STATE_FILE}.*fit again"):
            load_fitted(folder)

    def test_bytes_that_are_no_text(self, folder):
        (folder / STATE_FILE).write_bytes(b"\xff\xfe\x00")
        with pytest.raises(ValueError, match=rf"{STATE_FILE}.*fit again"):
            load_fitted(folder)

    def test_cut_off_anywhere(self, folder):
        text = (folder / STATE_FILE).read_text().rstrip()
        for length in range(0, len(text), 7):
            (folder / STATE_FILE).write_text(text[:length])
            with pytest.raises(ValueError, match="fit again"):
                load_fitted(folder)

    @pytest.mark.parametrize("version", [0, 2, "1", None])
    def test_another_version(self, folder, version):
        changed(folder, version=version)
        with pytest.raises(ValueError, match="not of version 1"):
            load_fitted(folder)

    @pytest.mark.parametrize("key", ["version", "fingerprint", "fitted", "snapshots"])
    def test_an_entry_is_missing(self, folder, key):
        content = json.loads((folder / STATE_FILE).read_text())
        del content[key]
        (folder / STATE_FILE).write_text(json.dumps(content))
        with pytest.raises(ValueError, match="fit again"):
            load_fitted(folder)

    @pytest.mark.parametrize(
        "entries",
        [
            {"more": 1},
            {"fitted": None},
            {"fitted": [1]},
            {"fitted": {"temprature": 1.0}},
            {"fitted": {"temperature": -1.0}},
            {"snapshots": None},
            {"snapshots": [3]},
            {"snapshots": "epoch"},
            {"fingerprint": None},
            {"fingerprint": 5},
        ],
        ids=str,
    )
    def test_entries_of_another_kind(self, folder, entries):
        changed(folder, **entries)
        with pytest.raises(ValueError, match=STATE_FILE):
            load_fitted(folder)

    def test_posterior_of_other_weights(self, folder):
        posterior_of(1).save(folder / POSTERIOR_FILE)
        with pytest.raises(ValueError, match="different fits"):
            load_fitted(folder)

    def test_posterior_is_gone_or_cut_off(self, folder):
        path = folder / POSTERIOR_FILE
        path.write_bytes(path.read_bytes()[:-10])
        with pytest.raises(ValueError, match="no complete safetensors file"):
            load_fitted(folder)
        path.unlink()
        with pytest.raises(FileNotFoundError, match=POSTERIOR_FILE):
            load_fitted(folder)

    def test_snapshot_is_gone(self, folder):
        (folder / "snapshots" / "epoch-9.safetensors").unlink()
        with pytest.raises(FileNotFoundError, match=r"gone: \[.*epoch-9"):
            load_fitted(folder)

    def test_nothing_there(self, tmp_path):
        with pytest.raises(FileNotFoundError):
            load_fitted(tmp_path)


def full(*_, **__):
    raise OSError("No space left on device")


class TestFailingWrites:
    @pytest.mark.parametrize(("owner", "name"), [(os, "fsync"), (Path, "replace")], ids=["fsync", "replace"])
    @pytest.mark.parametrize("with_posterior", [True, False])
    def test_old_files_stay_and_nothing_temporary_does(self, folder, monkeypatch, owner, name, with_posterior):
        before = files(folder)
        other = Fitted(FittedState(temperature=9.0), posterior_of(1) if with_posterior else None)
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, full)
            with pytest.raises(OSError, match="No space left"):
                save_fitted(folder, other)
        assert files(folder) == before
        assert load_fitted(folder)[0].state == STATE

    @pytest.mark.parametrize(("owner", "name"), [(os, "fsync"), (Path, "replace")], ids=["fsync", "replace"])
    def test_the_first_write_leaves_nothing(self, tmp_path, monkeypatch, fitted, owner, name):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, full)
            with pytest.raises(OSError, match="No space left"):
                save_fitted(tmp_path, fitted)
        assert files(tmp_path) == {}

    def test_between_the_two_files_is_noticed(self, folder, monkeypatch):
        replace_file = Path.replace

        def second_fails(self, target):
            return replace_file(self, target) if Path(target).name == POSTERIOR_FILE else full()

        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", second_fails)
            with pytest.raises(OSError, match="No space left"):
                save_fitted(folder, Fitted(STATE, posterior_of(1)))
        assert not any(name.endswith(".tmp") for name in files(folder))
        assert LaplacePosterior.load(folder / POSTERIOR_FILE)
        with pytest.raises(ValueError, match="different fits"):
            load_fitted(folder)

    def test_text_that_cannot_be_encoded(self, tmp_path):
        (tmp_path / "a.txt").write_text("old")
        with pytest.raises(UnicodeEncodeError):
            write_text(tmp_path / "a.txt", "new \ud800")
        assert files(tmp_path) == {"a.txt": b"old"}

    def test_text_is_utf_8_whatever_the_locale(self, tmp_path):
        write_text(tmp_path / "a.txt", "λ\n")
        assert files(tmp_path) == {"a.txt": "λ\n".encode()}
