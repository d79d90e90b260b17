"""A fit on disk: what is written, what is read, and that parts of two fits never load as one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from methods_cases import RANK3
from oracles.models import answer_logits, split, toy_batch, toy_model

from bmoe_lightning.curvature import Curvature
from bmoe_lightning.laplace import LaplacePosterior
from bmoe_lightning.methods import MAP, FitResult, LaplaceLPO, TemperatureScaling, evaluate, fit_methods, save_snapshot
from bmoe_lightning.methods.fit_result import FittedMethod
from bmoe_lightning.methods.storage import INDEX_FILE, POSTERIOR_FILE, has_fit, load_fit, save_fit

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
    assert all(torch.equal(*pair) for pair in zip(found.calibration, fit.calibration, strict=True))


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
    assert f"posterior-{other.curvature.digest}.safetensors" in names
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

    def test_only_files_of_the_same_fit_are_removed(self, fit, folders):
        one, _ = folders
        second = FitResult(fingerprint=fit.fingerprint, layers=fit.layers, methods=fit.methods)
        before = set(files_of(one))
        save_fit(one, second)
        assert before <= set(files_of(one))
        assert load_fit(one)[0].fit_id == second.fit_id


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/hostname", "a/../../b", ""])
def test_a_name_outside_of_the_folder_is_refused(fit, tmp_path, name):
    from bmoe_lightning.methods.storage import _INDEX_FORMAT, _VERSION
    from bmoe_lightning.utils.json_io import read_json_file, write_json_file

    save_fit(tmp_path, fit)
    header = read_json_file(tmp_path / INDEX_FILE, format=_INDEX_FORMAT, version=_VERSION)
    content = {**header.description, "states": {**header.description["states"], "file": name}}
    write_json_file(tmp_path / INDEX_FILE, format=_INDEX_FORMAT, version=_VERSION, description=content, fit=header.fit)
    with pytest.raises(ValueError, match="which is not a file in its folder"):
        load_fit(tmp_path)


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
