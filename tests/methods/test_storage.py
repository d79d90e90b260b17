"""A fit on disk: what is written, what is read, and that parts of two fits never load as one."""

from __future__ import annotations

import itertools
import json
import logging
import operator
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from methods_cases import RANK3
from oracles.models import answer_logits, split, toy_batch, toy_model
from unprivileged import unprivileged_folder

from bmoe_lightning.curvature import Curvature
from bmoe_lightning.laplace import LaplacePosterior, WeightMismatchError
from bmoe_lightning.methods import MAP, FitResult, LaplaceLPO, TemperatureScaling, evaluate, fit_methods, save_snapshot
from bmoe_lightning.methods.fit_result import FittedMethod
from bmoe_lightning.methods.storage import (
    INDEX_FILE,
    POSTERIOR_FILE,
    has_fit,
    load_fit,
    load_identity,
    save_fit,
    unreadable,
)
from bmoe_lightning.utils import safetensors_io

DOWN = "layers.0.mixture.crew.down_proj"
METHODS = (MAP(), TemperatureScaling(), LaplaceLPO(curvature=RANK3, num_samples=100))
BATCHES = split(toy_batch(num_rows=60, seed=3), 20, 20, 20)


@pytest.fixture(scope="module")
def fit():
    return fit_methods(METHODS, toy_model(), answer_logits, BATCHES, BATCHES)


def files_of(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def log_probs(fit, *methods):
    found = evaluate(methods or METHODS, fit, toy_model(), answer_logits, BATCHES)
    return {name: predictions.log_probs for name, predictions in found.items()}


def snapshot(folder, fit, epoch=0):
    path = folder / "snapshots" / f"{fit.fit_id[:8]}-epoch-{epoch:04d}.safetensors"
    save_snapshot(path, {DOWN: toy_model().get_parameter(DOWN)}, fit=fit.fit_id)
    return path


def test_comes_back_as_it_was(fit, tmp_path):
    path = snapshot(tmp_path, fit)
    assert not has_fit(tmp_path)
    save_fit(tmp_path, fit, [path])
    assert has_fit(tmp_path)
    found, snapshots = load_fit(tmp_path)
    assert snapshots == [path]
    assert (found.fit_id, found.fingerprint, found.layers, found.seed) == (
        fit.fit_id, fit.fingerprint, fit.layers, fit.seed,
    )  # fmt: skip
    assert found.methods.keys() == fit.methods.keys()
    assert all(found.differences(method) == [] and found.is_fitted(method) for method in METHODS)
    expected = log_probs(fit)
    assert all(torch.equal(value, expected[name]) for name, value in log_probs(found).items())
    found.check_weights(toy_model())
    assert found.weights == fit.weights
    assert all(torch.equal(*pair) for pair in zip(found.calibration, fit.calibration, strict=True))


def test_weights_cast_for_serving_are_accepted_with_a_line_and_others_are_not(tmp_path, caplog):
    model = toy_model().float()
    save_fit(tmp_path, fit_methods(METHODS, model, answer_logits, BATCHES, BATCHES))
    found, _ = load_fit(tmp_path)
    served = toy_model().float().bfloat16()
    with caplog.at_level(logging.WARNING):
        found.check_weights(served)
    lines = [record.getMessage() for record in caplog.records]
    assert [line for line in lines if "cast" in line] == [
        "the model has the weights of the fit cast from float32 to bfloat16. Predictions differ by the rounding of the "
        "cast; load the model in float32 to avoid that."
    ]
    with torch.no_grad():
        model.get_parameter(DOWN).add_(5e-5)
    for other in (model, model.bfloat16()):
        with pytest.raises(WeightMismatchError, match=r"\(1 parameters differ, \d+ were compared: layers\.\d\."):
            found.check_weights(other)


def test_the_posterior_is_served_by_itself_at_the_fitted_prior_precision(fit, tmp_path):
    save_fit(tmp_path, fit)
    posterior = LaplacePosterior.load(tmp_path / POSTERIOR_FILE)
    assert torch.equal(posterior.prior_precision, fit.methods["laplace_lpo"].state["prior_precision"])


def test_the_served_prior_precision_follows_a_method_that_is_fitted_again(fit, tmp_path):
    save_fit(tmp_path, fit)
    entry = fit.methods["laplace_lpo"]
    again = FittedMethod({key: 2 * value for key, value in entry.state.items()}, entry.options, entry.curvatures)
    save_fit(tmp_path, load_fit(tmp_path)[0].with_methods({"laplace_lpo": again}, {}))
    served = LaplacePosterior.load(tmp_path / POSTERIOR_FILE)
    assert torch.equal(served.prior_precision, again.state["prior_precision"])
    assert torch.equal(load_fit(tmp_path)[0].methods["laplace_lpo"].state["prior_precision"], served.prior_precision)
    assert sum(name.startswith("posterior") for name in files_of(tmp_path)) == 1


def test_each_curvature_has_a_file(fit, tmp_path):
    other = LaplaceLPO(name="other", curvature=Curvature(rank=2, fisher="empirical"), num_samples=100)
    both = fit_methods([*METHODS, other], toy_model(), answer_logits, BATCHES, BATCHES, earlier=fit)
    save_fit(tmp_path, both)
    names = files_of(tmp_path)
    assert POSTERIOR_FILE in names
    assert sum(name.startswith(f"posterior-{other.curvature.digest}-") for name in names) == 1
    found, _ = load_fit(tmp_path)
    expected = log_probs(both, *METHODS, other)
    assert all(torch.equal(value, expected[name]) for name, value in log_probs(found, *METHODS, other).items())


def test_adding_a_method_writes_its_state_and_leaves_the_curvature_alone(fit, tmp_path):
    save_fit(tmp_path, fit)
    posterior = tmp_path / POSTERIOR_FILE
    before, stat = set(files_of(tmp_path)), posterior.stat()
    added = LaplaceLPO(name="lpo_global", scope="global", curvature=RANK3)
    more = fit_methods([*METHODS, added], toy_model(), answer_logits, BATCHES, BATCHES, earlier=load_fit(tmp_path)[0])
    save_fit(tmp_path, more)
    assert (posterior.stat().st_ino, posterior.stat().st_mtime_ns) == (stat.st_ino, stat.st_mtime_ns)
    after = set(files_of(tmp_path))
    assert len(after) == len(before)  # the states are replaced
    assert {name for name in before ^ after if not name.startswith("methods-")} == set()
    assert load_fit(tmp_path)[0].methods.keys() == {*fit.methods, "lpo_global"}


def test_a_method_that_this_release_does_not_know_is_left_alone(fit, tmp_path):
    strange = FittedMethod({"moments": torch.ones(2, 3)}, {"class": "TheirMethod", "depth": 3})
    save_fit(tmp_path, fit.with_methods({"theirs": strange}, {}))
    found = load_fit(tmp_path)[0].methods["theirs"]
    assert torch.equal(found.state["moments"], strange.state["moments"])
    assert found.options == strange.options


def test_factors_stay_on_the_cpu_where_asked(fit, tmp_path):
    save_fit(tmp_path, fit)
    assert not load_fit(tmp_path)[0].posteriors[RANK3.digest].offload
    assert load_fit(tmp_path, offload=[RANK3.digest])[0].posteriors[RANK3.digest].offload


class TestTwoFits:
    """Faults: a second training that was killed half-way, parts copied from another run."""

    @pytest.fixture
    def folders(self, fit, tmp_path):
        other = FitResult(
            fingerprint=fit.fingerprint, layers=fit.layers, methods=fit.methods, posteriors=fit.posteriors
        )
        for name, one in (("one", fit), ("other", other)):
            save_fit(tmp_path / name, one, [snapshot(tmp_path / name, one)])
        return tmp_path / "one", tmp_path / "other"

    @pytest.mark.parametrize("pattern", [POSTERIOR_FILE, "methods-*.safetensors", "snapshots/*.safetensors"])
    def test_a_file_of_another_fit_is_refused(self, folders, pattern):
        one, other = folders
        (target,), (source,) = one.glob(pattern), other.glob(pattern)
        target.write_bytes(source.read_bytes())
        with pytest.raises(ValueError, match="belong to different fits"):
            load_fit(one)

    def test_an_index_of_another_fit_is_refused(self, folders):
        one, other = folders
        (one / INDEX_FILE).write_bytes((other / INDEX_FILE).read_bytes())
        with pytest.raises((ValueError, FileNotFoundError)):
            load_fit(one)

    def test_a_file_of_an_earlier_write_of_the_same_fit_is_refused(self, fit, folders):
        old = (folders[0] / POSTERIOR_FILE).read_bytes()
        shifted = {
            name: FittedMethod({k: v * 2 for k, v in entry.state.items()}, entry.options, entry.curvatures)
            for name, entry in fit.methods.items()
        }
        again = folders[0].parent / "again"
        save_fit(again, FitResult(fit.fit_id, fit.fingerprint, fit.layers, shifted, fit.posteriors))
        (again / POSTERIOR_FILE).write_bytes(old)
        with pytest.raises(ValueError, match="belong to different fits"):
            load_fit(again)

    @pytest.mark.parametrize(
        "pattern", [POSTERIOR_FILE, "methods-*.safetensors", "snapshots/*.safetensors", INDEX_FILE]
    )
    def test_a_missing_file_is_named(self, folders, pattern):
        (path,) = folders[0].glob(pattern)
        path.unlink()
        with pytest.raises(FileNotFoundError, match=path.name):
            load_fit(folders[0])

    def test_a_second_fit_that_was_not_finished_leaves_the_first_or_is_refused(self, fit, tmp_path, monkeypatch):
        from bmoe_lightning.methods import storage

        save_fit(tmp_path, fit)
        second = FitResult(fingerprint=fit.fingerprint, layers=fit.layers, methods=fit.methods)
        monkeypatch.setattr(storage, "write_json_file", lambda *_, **__: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            save_fit(tmp_path, second)
        found, _ = load_fit(tmp_path)
        assert found.fit_id == fit.fit_id
        assert torch.equal(log_probs(found)["laplace_lpo"], log_probs(fit)["laplace_lpo"])

    def test_what_the_replaced_index_named_is_removed_but_for_snapshots(self, fit, folders):
        one, _ = folders
        (one / "posterior-of-mine.safetensors").write_bytes(b"mine")
        before = set(files_of(one))
        second = FitResult(fingerprint=fit.fingerprint, layers=fit.layers, methods=fit.methods)
        save_fit(one, second)
        after = set(files_of(one))
        gone = {name for name in before if name.startswith("methods-")} | {POSTERIOR_FILE}
        assert before - after == gone  # the second fit has no curvature, and a checkpoint may name the snapshots
        assert load_fit(one)[0].fit_id == second.fit_id

    def test_superseded_snapshots_of_the_same_fit_are_removed(self, fit, folders):
        one, _ = folders
        (first,) = (one / "snapshots").iterdir()
        save_fit(one, fit, [snapshot(one, fit, epoch=1)])
        assert load_fit(one)[1] == list((one / "snapshots").iterdir())
        assert not first.exists()


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


BIG = {"moments": torch.arange(3.0 * 2**17).reshape(3, -1), "seed": torch.tensor(3)}


class TestLargeStates:
    def test_have_a_file_that_other_methods_do_not_rewrite(self, fit, tmp_path):
        big = fit.with_methods({"big": FittedMethod(BIG, {"class": "Big"})}, {})
        save_fit(tmp_path, big)
        (path,) = tmp_path.glob("state-big-*.safetensors")
        stat = path.stat()
        (methods,) = tmp_path.glob("methods-*")
        assert methods.stat().st_size < 2**18
        found = load_fit(tmp_path)[0]
        assert found.methods["big"].state.keys() == BIG.keys()
        assert all(torch.equal(value, BIG[key]) for key, value in found.methods["big"].state.items())
        save_fit(tmp_path, found.with_methods({"small": FittedMethod({"x": torch.ones(1)}, {})}, {}))
        assert list(tmp_path.glob("state-*")) == [path]
        assert (path.stat().st_ino, path.stat().st_mtime_ns) == (stat.st_ino, stat.st_mtime_ns)
        assert load_fit(tmp_path)[0].methods.keys() == {*fit.methods, "big", "small"}

    def test_a_damaged_file_is_written_again(self, fit, tmp_path):
        big = fit.with_methods({"big": FittedMethod(BIG, {"class": "Big"})}, {})
        save_fit(tmp_path, big)
        (path,) = tmp_path.glob("state-big-*.safetensors")
        content = bytearray(path.read_bytes())
        content[-5] ^= 4
        path.write_bytes(content)
        with pytest.raises(ValueError, match=path.name):
            load_fit(tmp_path)
        save_fit(tmp_path, big)
        assert torch.equal(load_fit(tmp_path)[0].methods["big"].state["moments"], BIG["moments"])
        assert not path.exists()


def name_states(folder, name):
    """Change the name of a file in the index, and seal it again."""
    from bmoe_lightning.methods.storage import _INDEX_FORMAT, _VERSION
    from bmoe_lightning.utils.json_io import read_json_file, write_json_file

    header = read_json_file(folder / INDEX_FILE, format=_INDEX_FORMAT, version=_VERSION)
    content = {**header.description, "states": {**header.description["states"], "file": name}}
    write_json_file(folder / INDEX_FILE, format=_INDEX_FORMAT, version=_VERSION, description=content, fit=header.fit)


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


def test_the_identity_is_that_of_the_fit(fit, tmp_path):
    save_fit(tmp_path, fit)
    found = load_identity(tmp_path)
    assert (found.fit_id, found.fingerprint, found.layers) == (fit.fit_id, fit.fingerprint, fit.layers)
    assert found.weights == fit.weights
    assert found.has_weights_of(toy_model())
    assert found.methods == found.posteriors == {}


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


def test_a_run_that_was_resumed_after_its_fit_replaces_the_curvature(fit, tmp_path):
    save_fit(tmp_path, fit)
    (digest,) = fit.posteriors
    others = [{**batch, "labels": batch["labels"].flip(0)} for batch in BATCHES[:2]]
    moved = toy_model()
    with torch.no_grad():
        moved.get_parameter(DOWN).mul_(2)
    resumed = fit_methods(METHODS, moved, answer_logits, others, BATCHES, fit_id=fit.fit_id)
    save_fit(tmp_path, resumed)
    found, _ = load_fit(tmp_path)
    assert (found.fit_id, found.fingerprint) == (fit.fit_id, resumed.fingerprint)
    for layer, expected in zip(
        found.posteriors[digest].factors.layers, resumed.posteriors[digest].factors.layers, strict=True
    ):
        assert all(torch.equal(value, expected.tensors()[name]) for name, value in layer.tensors().items())
    assert len(list(tmp_path.glob("methods-*"))) == 1


def test_warnings_are_stored_and_may_be_missing(tmp_path):
    fit = FitResult(methods={"one": FittedMethod({}, {}, (), ("at a bound; add labels",)), "two": FittedMethod({}, {})})
    save_fit(tmp_path, fit)
    assert load_fit(tmp_path)[0].methods["one"].warnings == ("at a bound; add labels",)
    assert load_fit(tmp_path)[0].methods["two"].warnings == ()
