"""The folder of a fit: a whole fit whenever its writer is killed, and an index that names only files within it."""

from __future__ import annotations

import itertools
import json
import operator
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fit_files import BATCHES, METHODS, files_of, snapshot
from oracles.models import answer_logits, toy_model
from unprivileged import unprivileged_folder

from bmoe_lightning.laplace import LaplacePosterior
from bmoe_lightning.methods import fit_methods
from bmoe_lightning.methods.fit_index import INDEX_FILE, POSTERIOR_FILE, has_fit, unreadable
from bmoe_lightning.methods.fit_result import FittedMethod
from bmoe_lightning.methods.storage import load_fit, load_identity, save_fit
from bmoe_lightning.utils import safetensors_io


@pytest.fixture(scope="module")
def fit():
    return fit_methods(METHODS, toy_model(), answer_logits, BATCHES, BATCHES)


class Killed(BaseException):
    """Ends a writer; nothing that it does afterwards has an effect."""


class TestKilledWriters:
    """A writer is killed before each of its operations on files."""

    OPERATIONS = ("os.replace", "os.rename", "os.unlink", "os.fsync", "os.link")

    @pytest.fixture
    def killed_at(self, monkeypatch):
        def kill(action, number):
            done = 0

            def counted(function):
                def call(*args, **options):
                    nonlocal done
                    done += 1
                    if done > number:
                        raise Killed
                    return function(*args, **options)

                return call

            with monkeypatch.context() as patch:
                for name in self.OPERATIONS:
                    patch.setattr(name, counted(operator.attrgetter(name.partition(".")[2])(os)))
                patch.setattr(safetensors_io, "save_file", counted(safetensors_io.save_file))
                try:
                    action()
                except Killed:
                    return True
            return False

        return kill

    def same_fit(self, found, expected):
        return (
            found.fit_id == expected.fit_id
            and found.methods.keys() == expected.methods.keys()
            and torch.equal(*(f.methods["laplace_lpo"].state["prior_precision"] for f in (found, expected)))
            and all(torch.equal(found.posteriors[d].prior_precision, expected.served_posterior(d).prior_precision)
                    for d in expected.posteriors)
        )  # fmt: skip

    @pytest.mark.parametrize("same_id", [True, False])
    def test_either_fit_is_there_and_can_be_completed(self, fit, tmp_path, killed_at, same_id):
        shifted = {
            name: FittedMethod({k: v * 2 for k, v in entry.state.items()}, entry.options, entry.curvatures)
            for name, entry in fit.methods.items()
        }
        second = replace(fit, methods=shifted, **({} if same_id else {"fit_id": "b" * 32}))
        seen = []
        for number in itertools.count():
            folder = tmp_path / str(number)
            first = f"snapshots/{snapshot(folder, fit).name}"
            save_fit(folder, fit, [folder / first])
            later = snapshot(folder, second, epoch=1)
            was_killed = killed_at(lambda: save_fit(folder, second, [later]), number)  # noqa: B023
            found, snapshots = load_fit(folder)
            seen.append(self.same_fit(found, second))
            assert seen[-1] or self.same_fit(found, fit)
            assert [path.is_file() for path in snapshots] == [True]
            served = LaplacePosterior.load(folder / POSTERIOR_FILE)  # by its name, whatever happened
            assert torch.equal(served.prior_precision, found.methods["laplace_lpo"].state["prior_precision"])
            save_fit(folder, second, [later])
            assert self.same_fit(load_fit(folder)[0], second)
            left = {name for name in files_of(folder) if not name.startswith("methods-")}
            assert left - {first} == {"index.json", POSTERIOR_FILE, f"snapshots/{later.name}"}
            assert (first in left) == (not same_id)  # a checkpoint may name the snapshots of another fit
            assert len(list(folder.glob("methods-*"))) == 1
            if not was_killed:
                break
        assert len(seen) > 8
        assert seen == sorted(seen)  # the switch is one operation
        assert not seen[0]
        assert seen[-1]

    def test_a_folder_that_cannot_be_written_to_is_read_before_its_rename(self, fit, tmp_path, killed_at, monkeypatch):
        second = replace(fit, fit_id="b" * 32)
        for number in itertools.count():
            folder = tmp_path / str(number)
            save_fit(folder, fit)
            killed_at(lambda: save_fit(folder, second), number)  # noqa: B023
            if json.loads((folder / INDEX_FILE).read_text())["fit"] == second.fit_id:
                break
        assert len(list(folder.glob("posterior-*"))) == 1

        def refuse(*_):
            raise PermissionError(13, "read-only")

        with monkeypatch.context() as patch:
            patch.setattr("os.replace", refuse)
            assert load_fit(folder)[0].fit_id == second.fit_id
            assert LaplacePosterior.load(folder / POSTERIOR_FILE) is not None
        load_fit(folder)
        assert not list(folder.glob("posterior-*"))


def name_states(folder, name):
    """Change the name of a file in the index, and seal it again."""
    from bmoe_lightning.methods.fit_index import INDEX_FORMAT, VERSION
    from bmoe_lightning.utils.json_io import read_json_file, write_json_file

    header = read_json_file(folder / INDEX_FILE, format=INDEX_FORMAT, version=VERSION)
    content = {**header.description, "states": {**header.description["states"], "file": name}}
    write_json_file(folder / INDEX_FILE, format=INDEX_FORMAT, version=VERSION, description=content, fit=header.fit)


@pytest.mark.parametrize("load", [load_fit, load_identity])
@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/hostname", "a/../../b", "", ".", "..", "a\0b"])
def test_a_name_outside_of_the_folder_is_refused(fit, tmp_path, name, load):
    save_fit(tmp_path, fit)
    name_states(tmp_path, name)
    with pytest.raises(ValueError, match="which is not a file in its folder"):
        load(tmp_path)


@pytest.mark.parametrize("load", [load_fit, load_identity])
@pytest.mark.parametrize(
    ("name", "error", "said"),
    [
        ("x" * 5000, OSError, "File name too long"),
        ("loop", OSError, "Too many levels"),
        ("pipe", OSError, "is a pipe or a device"),
        ("index.json", ValueError, "is not a complete methods file"),
        ("index.json/below", NotADirectoryError, "Not a directory"),
        (5, ValueError, "is not a complete fit index file"),
        (None, ValueError, "is not a complete fit index file"),
    ],
)
def test_a_name_of_what_is_no_file_is_refused_and_replaced(fit, tmp_path, name, error, said, load):
    save_fit(tmp_path, fit)
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "pipe")
    name_states(tmp_path, name)
    with pytest.raises(error, match=said) as caught:
        load(tmp_path)
    assert str(tmp_path) in str(caught.value)
    save_fit(tmp_path, fit)
    assert load(tmp_path)


def test_a_folder_that_cannot_be_entered_is_told_from_one_without_a_fit(fit):
    with unprivileged_folder() as root:
        assert unreadable(root) is unreadable(root / "missing") is None
        save_fit(root / "fit", fit)
        (root / "fit").chmod(0)
        assert not has_fit(root / "fit")
        assert isinstance(unreadable(root / "fit"), PermissionError)
        for name in ("x" * 5000, "a\0b"):
            assert isinstance(unreadable(root / name), OSError)


def test_a_damaged_index_is_refused(fit, tmp_path):
    save_fit(tmp_path, fit)
    path = tmp_path / INDEX_FILE
    content = json.loads(path.read_text())
    content["description"]["seed"] = 7
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="does not match its SHA-256 digest"):
        load_fit(tmp_path)


def test_paths_in_the_index_are_names_within_the_folder(fit, tmp_path):
    save_fit(tmp_path, fit, [snapshot(tmp_path, fit)])
    assert str(tmp_path) not in (tmp_path / INDEX_FILE).read_text()
    moved = tmp_path.with_name(tmp_path.name + "-moved")
    tmp_path.rename(moved)
    _, snapshots = load_fit(moved)
    assert [Path(path).parent.parent for path in snapshots] == [moved]
    moved.rename(tmp_path)
