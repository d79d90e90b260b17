"""Evaluation runs of the callback: what the module's step does to a batch, streams, several loaders, and no fit yet."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch.utils.data import DataLoader, IterableDataset
from toy import ToyData, ToyModule, calibration_loader, loader, test_loader, trainer

from bmoe_lightning.callback import BayesianMoECallback
from bmoe_lightning.curvature import Curvature
from bmoe_lightning.methods import EvidenceTemperature, LaplaceEvidence

ROWS = 48


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """A module, a folder with its fit, and the metrics of its test."""
    folder = tmp_path_factory.mktemp("fitted")
    callback = BayesianMoECallback(["map", "checkpoint_ensemble", "temperature"], dirpath=str(folder / "b"))
    module = ToyModule()
    run = trainer(folder, [callback], max_epochs=2)
    run.fit(module, loader(32, 1), calibration_loader())
    return module, folder, run.test(module, test_loader(), verbose=False)[0]


def evaluated(fitted, data, step=None, methods=("map", "checkpoint_ensemble", "temperature")):
    module, folder, _ = fitted
    callback = BayesianMoECallback(list(methods), dirpath=str(folder / "b"))
    run = trainer(folder, [callback])
    own = ToyModule.test_step
    try:
        if step is not None:
            ToyModule.test_step = step
        return run.test(module, data, verbose=False), callback
    finally:
        ToyModule.test_step = own


def ours(metrics):
    return {name: value for name, value in metrics.items() if name.count("/") == 2}


class TestBatch:
    @pytest.mark.parametrize(
        "step",
        [
            lambda self, batch, i: batch.pop("labels"),
            lambda self, batch, i: batch.clear(),
            lambda self, batch, i: batch.update(labels=None),
        ],
        ids=["pops labels", "clears", "replaces"],
    )
    def test_a_step_that_consumes_it(self, fitted, step):
        found, _ = evaluated(
            fitted, test_loader(), lambda self, batch, batch_idx: (step(self, batch, batch_idx), None)[1]
        )
        assert ours(found[0]) == pytest.approx(ours(fitted[2]), rel=1e-6)

    @pytest.mark.parametrize("seen_as", [lambda ids: ids, lambda ids: ids.data, lambda ids: ids.numpy()])
    def test_a_step_that_writes_to_it(self, fitted, seen_as):
        def step(self, batch, batch_idx):
            seen_as(batch["input_ids"])[:, 0] = 5

        with pytest.raises(RuntimeError, match=r"the module's test_step writes in place to batch\['input_ids'\]"):
            evaluated(fitted, test_loader(), step)

    def test_class_logits_that_pops_labels(self, tmp_path):
        class Pops(ToyModule):
            def class_logits(self, batch):
                labels = batch.pop("labels")
                return ToyModule.class_logits(self, batch)[0], labels

            def validation_step(self, batch, batch_idx):
                return None

            test_step = validation_step

        module = Pops()
        run = trainer(tmp_path, [BayesianMoECallback(["map", "mc_dropout", "temperature"])], max_epochs=1)
        run.fit(module, loader(16, 1), calibration_loader())
        assert "mc_dropout/test/nll" in run.test(module, test_loader(), verbose=False)[0]


class Rows(IterableDataset):
    def __iter__(self):
        data = ToyData(ROWS, 3)
        return (data[i] for i in range(ROWS))


class TestLoaders:
    def test_a_stream_is_tested_like_its_data(self, fitted):
        """Without a length, with an ensemble that passes over it once per member."""
        found, _ = evaluated(fitted, DataLoader(Rows(), 16))
        assert ours(found[0]) == pytest.approx(ours(fitted[2]), rel=1e-6)

    def test_a_dict_of_loaders(self, fitted):
        def step(self, batch, batch_idx, dataloader_idx=0):
            return None

        found, callback = evaluated(fitted, {"a": test_loader(), "b": loader(32, 5)}, step)
        assert set(callback.predictions) == {"test_0", "test_1"}
        metrics = {name: value for part in found for name, value in part.items()}
        for name, value in ours(fitted[2]).items():
            assert metrics[name.replace("/test/", "/test_0/")] == pytest.approx(value, rel=1e-6)

    def test_no_predictions_of_an_earlier_test_are_left(self, fitted):
        module, folder, _ = fitted
        callback = BayesianMoECallback(["map"], dirpath=str(folder / "b"))
        run = trainer(folder, [callback])
        rows = ToyData(32, 5)
        wrong = [{**rows[index], "labels": rows[index]["labels"] + 10} for index in range(32)]
        own, ToyModule.test_step = ToyModule.test_step, lambda self, batch, batch_idx, dataloader_idx=0: None
        try:
            run.test(module, [test_loader(), loader(32, 5)], verbose=False)
            run.test(module, loader(32, 5), verbose=False)
            assert set(callback.predictions) == {"test"}
            run.validate(module, test_loader(), verbose=False)
            assert set(callback.predictions) == {"test", "val"}
            with pytest.raises(ValueError, match="label"):
                run.test(module, DataLoader(wrong, 16), verbose=False)
            assert set(callback.predictions) == {"val"}
        finally:
            ToyModule.test_step = own

    @pytest.mark.parametrize("mode", ["min_size", "max_size_cycle"])
    def test_loaders_drawn_from_together(self, fitted, mode):
        module, folder, expected = fitted
        both = CombinedLoader({"a": test_loader(), "b": loader(80, 5)}, mode)
        callback = BayesianMoECallback(
            ["map", "checkpoint_ensemble"], dirpath=str(folder / "b"), class_logits=lambda m, b: m.class_logits(b["a"])
        )
        own, ToyModule.test_step = ToyModule.test_step, lambda self, batch, batch_idx: None
        try:
            found = trainer(folder, [callback]).test(module, both, verbose=False)[0]
        finally:
            ToyModule.test_step = own
        assert len(callback.predictions["test"]["map"].labels) == (48 if mode == "min_size" else 80)
        if mode == "min_size":
            assert found["checkpoint_ensemble/test/nll"] == pytest.approx(expected["checkpoint_ensemble/test/nll"])

    def test_a_validation_loader_in_a_dict(self, tmp_path):
        callback = BayesianMoECallback(["map", "temperature"])
        trainer(tmp_path, [callback], max_epochs=1).fit(ToyModule(), loader(16, 1), {"a": calibration_loader()})
        assert callback.fitted.is_fitted(callback.methods[1])

    def test_batches_of_their_own_width(self, fitted):
        """K follows the batch."""
        module, folder, _ = fitted

        def class_logits(model, batch):
            logits, _ = model.class_logits(batch)
            wide = len(logits) == 16
            return (logits if wide else logits[:, :2]), batch["labels"] % 2

        callback = BayesianMoECallback(
            ["map", "checkpoint_ensemble"], class_logits=class_logits, dirpath=str(folder / "b")
        )
        found = trainer(folder, [callback]).test(module, loader(40, 3), verbose=False)[0]
        log_probs = callback.predictions["test"]["map"].log_probs
        assert log_probs.shape == (40, 3)
        assert bool((log_probs[32:, 2] == -torch.inf).all())
        assert found["map/test/nll"] > 0


class TestBeforeAFit:
    def test_validation_logs_what_needs_no_fit(self, tmp_path):
        callback = BayesianMoECallback(["map", "temperature", "checkpoint_ensemble"], dirpath=str(tmp_path / "b"))
        run, module = trainer(tmp_path, [callback], max_epochs=2), ToyModule()
        with pytest.warns(UserWarning, match="temperature, checkpoint_ensemble are not evaluated"):
            found = run.validate(module, test_loader(), verbose=False)[0]
        assert {name.split("/")[0] for name in ours(found)} == {"map"}
        logits, labels = module.eval().class_logits({"input_ids": ToyData(48, 3).ids, "labels": ToyData(48, 3).labels})
        expected = torch.nn.functional.cross_entropy(logits.double(), labels)
        assert found["map/val/nll"] == pytest.approx(float(expected), rel=1e-5)
        module.train()
        run.fit(module, loader(16, 1), calibration_loader())
        assert "temperature/val/nll" in run.validate(module, test_loader(), verbose=False)[0]

    def test_a_script_with_a_dirpath_runs_twice(self, tmp_path):
        for seed in (0, 1):
            callback = BayesianMoECallback(["map", "temperature"], dirpath=str(tmp_path / "b"))
            run, module = trainer(tmp_path, [callback], max_epochs=1), ToyModule(seed)
            with pytest.warns(UserWarning, match="temperature are not evaluated in this validation") as said:
                found = run.validate(module, test_loader(), verbose=False)[0]
            assert {name.split("/")[0] for name in ours(found)} == {"map"}
            assert any("b has a fit to other weights than the model" in str(w.message) for w in said) == bool(seed)
            run.fit(module, loader(16, 1), calibration_loader())
            assert "temperature/test/nll" in run.test(module, test_loader(), verbose=False)[0]

    def test_a_damaged_fit_is_refused(self, tmp_path):
        module, options = ToyModule(), {"methods": ["map", "temperature"], "dirpath": str(tmp_path / "b")}
        trainer(tmp_path, [BayesianMoECallback(**options)], max_epochs=1).fit(
            module, loader(16, 1), calibration_loader()
        )
        (tmp_path / "b" / "index.json").write_text("{}")
        with pytest.raises(ValueError, match=r"index\.json"):
            trainer(tmp_path, [BayesianMoECallback(**options)]).validate(module, test_loader(), verbose=False)

    def test_nothing_to_log(self, tmp_path):
        run = trainer(tmp_path, [BayesianMoECallback(["temperature"])])
        with pytest.raises(RuntimeError, match="no fit was found"):
            run.validate(ToyModule(), test_loader(), verbose=False)


class TestPredict:
    def test_two_named_callbacks(self, fitted):
        module, folder, _ = fitted
        callbacks = [
            BayesianMoECallback(["map", "temperature"], name=name, predict_method=method, dirpath=str(folder / "b"))
            for name, method in (("one", "map"), ("two", None))
        ]
        for callback in callbacks:
            callback._folder.given = folder / "b"  # both read the same fit
        run = trainer(folder, callbacks)
        found = run.predict(module, test_loader())
        assert [output["method"] for output in found] == ["map"] * 3
        assert "predict_step" not in vars(module)
        callbacks[1].predict_method = "temperature"
        with pytest.raises(ValueError, match="two callbacks have a predict_method"):
            run.predict(module, test_loader())
        assert "predict_step" not in vars(module)


class Several(ToyModule):
    """Each entry of the data set holds eight examples."""

    def class_logits(self, batch):
        return ToyModule.class_logits(self, {name: values.flatten(0, 1) for name, values in batch.items()})

    def validation_step(self, batch, batch_idx):
        return None


def grouped(size, seed, per_entry=8):
    data = ToyData(size, seed)
    entries = [
        {"input_ids": data.ids[i : i + per_entry], "labels": data.labels[i : i + per_entry]}
        for i in range(0, size, per_entry)
    ]
    return DataLoader(entries, batch_size=2)


class TestCounts:
    def test_inputs_are_counted_and_not_entries(self, tmp_path):
        callback = BayesianMoECallback([EvidenceTemperature(prior_mean="zero")])
        run = trainer(tmp_path, [callback], max_epochs=1)
        run.fit(Several(), grouped(32, 1), grouped(112, 2))
        assert callback.fitted.is_fitted(callback.methods[0])
        with pytest.raises(ValueError, match="at least 100 inputs of the validation split, and there are 80"):
            trainer(tmp_path, [callback]).fit(Several(), grouped(32, 1), grouped(80, 2))

    def test_a_capped_pass_over_uneven_batches(self, tmp_path):
        uneven = [list(range(16 * i + start, 16 * i + end)) for i in range(3) for start, end in ((0, 4), (4, 16))]
        factors = []
        for batches, cap in ((uneven, 2), (uneven, None)):
            callback = BayesianMoECallback([LaplaceEvidence(prior_mean="zero")], curvature=Curvature(max_batches=cap))
            data = DataLoader(ToyData(48, 1), batch_sampler=batches)
            trainer(tmp_path, [callback], max_epochs=1).fit(ToyModule(learning_rate=0.0), data)
            factors.append(next(iter(callback.fitted.posteriors.values())).factors)
        assert [(f.num_examples_used, f.num_examples) for f in factors] == [(16, 48), (48, 48)]
        # Of a quarter of the slots, three times as much.
        capped, whole = (float(sum(layer.curvature().sum() for layer in f.layers)) for f in factors)
        assert capped == pytest.approx(whole, rel=0.5)
