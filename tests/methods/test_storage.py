"""A fit on disk: what is written, what is read, and that parts of two fits never load as one."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch
from fit_files import BATCHES, DOWN, METHODS, files_of, log_probs, snapshot
from methods_cases import RANK3
from oracles.models import answer_logits, toy_model

from bmoe_lightning.curvature import Curvature
from bmoe_lightning.laplace import LaplacePosterior, WeightMismatchError
from bmoe_lightning.methods import FitResult, LaplaceLPO, fit_methods
from bmoe_lightning.methods.fit_index import INDEX_FILE, POSTERIOR_FILE, has_fit
from bmoe_lightning.methods.fit_result import FittedMethod
from bmoe_lightning.methods.storage import load_fit, load_identity, save_fit


@pytest.fixture(scope="module")
def fit():
    return fit_methods(METHODS, toy_model(), answer_logits, BATCHES, BATCHES)


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


def test_posteriors_over_parts_of_the_layers_still_share_them(tmp_path):
    whole = LaplaceLPO(curvature=RANK3)
    methods = [whole, *(LaplaceLPO(name=f"skip_{i}", curvature=replace(RANK3, skip_layers=(i,))) for i in (0, 1))]
    save_fit(tmp_path, fit_methods(methods, toy_model(), answer_logits, BATCHES, BATCHES))
    found, _ = load_fit(tmp_path)
    first, *parts = (found.posteriors[method.curvature.digest].factors.layers for method in methods)
    assert parts[0][0] is first[1]
    assert parts[1][0] is first[0]


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
        from bmoe_lightning.methods import fit_index

        save_fit(tmp_path, fit)
        second = FitResult(fingerprint=fit.fingerprint, layers=fit.layers, methods=fit.methods)
        monkeypatch.setattr(fit_index, "write_json_file", lambda *_, **__: (_ for _ in ()).throw(OSError("disk full")))
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


def test_the_identity_is_that_of_the_fit(fit, tmp_path):
    save_fit(tmp_path, fit)
    found = load_identity(tmp_path)
    assert (found.fit_id, found.fingerprint, found.layers) == (fit.fit_id, fit.fingerprint, fit.layers)
    assert found.weights == fit.weights
    assert found.has_weights_of(toy_model())
    assert found.methods == found.posteriors == {}


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


def test_limited_terms_are_stored_and_may_be_missing(tmp_path):
    limited = {"one": FittedMethod({}, {}, limited_terms={"0123abcd": 1000}), "two": FittedMethod({}, {})}
    save_fit(tmp_path, FitResult(methods=limited))
    found = load_fit(tmp_path)[0].methods
    assert found["one"].limited_terms == {"0123abcd": 1000}
    assert found["two"].limited_terms == {}
