"""Methods in the callback: a user's own, several of a class, several curvatures, added ones, and what they cost."""

from __future__ import annotations

from dataclasses import dataclass

import lightning as L
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader
from toy import ANSWER_TOKENS, ToyData, ToyModule, calibration_loader, loader, test_loader, train_loader, trainer

from bmoe_lightning.callback import BayesianMoECallback
from bmoe_lightning.curvature import Curvature, LinearLayers
from bmoe_lightning.laplace import LaplacePosterior
from bmoe_lightning.methods import (
    CheckpointEnsemble,
    LaplaceEvidence,
    LaplaceLPO,
    Method,
    NotFittedError,
    TemperatureScaling,
    get_method,
    method_names,
)
from bmoe_lightning.methods.base import scalar
from bmoe_lightning.methods.needs import Needs
from bmoe_lightning.methods.storage import load_fit


@dataclass(frozen=True)
class Mine(Method):
    """Divides the logits by twice the temperature that fits; a method in a user's own module."""

    name: str = "mine"
    label: str = "My method"

    @property
    def needs(self):
        return Needs(calibration_labels=True)

    def fit(self, work):
        return {"scale": 2 * TemperatureScaling().fit(work)["temperature"]}

    def log_probs(self, batch, state):
        return (batch.logits / state["scale"]).log_softmax(-1)


class Counted(ToyModule):
    """Counts its forward passes in evaluation mode outside of its own steps."""

    def __init__(self, **options):
        super().__init__(**options)
        self.forwards = 0

    def class_logits(self, batch):
        self.forwards += not self.training and not getattr(self, "in_step", False)
        return super().class_logits(batch)

    def validation_step(self, batch, batch_idx):
        return None

    def test_step(self, batch, batch_idx):
        return None


class ToyDataModule(L.LightningDataModule):
    def train_dataloader(self):
        return train_loader()

    def val_dataloader(self):
        return calibration_loader()

    def test_dataloader(self):
        return test_loader()


SEVERAL = {"mc_dropout", "checkpoint_ensemble", "deep_ensemble", "swag", "laplace_mixture"}
SEVERAL |= {name for name in method_names() if get_method(name).needs.routers}
SINGLE = [name for name in method_names() if name not in SEVERAL and not get_method(name).needs.lora]
TRAIN, CALIBRATION, TEST = 10, 7, 3  # batches


def test_each_data_set_is_passed_over_once_for_all_methods(tmp_path):
    """One curvature pass for each curvature, one pass over the calibration split, one over the test split."""
    # One has a curvature of its own, and one takes a further pass over part of the training data.
    shared = [name for name in SINGLE if name != "laplace_last_layer" and not get_method(name).needs.training_labels]
    methods = [*shared, LaplaceLPO(name="probit", link="probit")]
    callback = BayesianMoECallback(methods, dirpath=str(tmp_path / "b"))
    module = Counted()
    run = trainer(tmp_path, [callback], num_sanity_val_steps=0)
    run.fit(module, train_loader(), calibration_loader())
    # And the checks of the first batch of both, before training, and four batches again for the share of the gradient.
    begun = 3 + 4
    assert module.forwards == TRAIN + CALIBRATION + begun
    run.test(module, test_loader(), verbose=False)
    assert module.forwards == TRAIN + CALIBRATION + begun + TEST + 2

    # A method that is added costs what it needs, and the first training batch: the data must be those of the fit.
    added = BayesianMoECallback([*methods, TemperatureScaling(name="again"), Mine()], dirpath=str(tmp_path / "b"))
    module.forwards = 0
    added.fit_posterior(module, trainer=trainer(tmp_path, [added]), datamodule=ToyDataModule())
    assert module.forwards == CALIBRATION + 1
    other = LaplaceLPO(name="other", scope="global")
    added = BayesianMoECallback([*methods, other], dirpath=str(tmp_path / "b"))
    module.forwards = 0
    added.fit_posterior(module, trainer=trainer(tmp_path, [added]), datamodule=ToyDataModule())
    assert module.forwards == CALIBRATION + 1
    found, _ = load_fit(tmp_path / "b")
    assert {"again", "mine", "other", "probit"} <= found.methods.keys()
    assert found.fit_id == callback.fitted.fit_id


def test_a_method_of_the_user_appears_like_the_rest(tmp_path):
    logger = L.pytorch.loggers.TensorBoardLogger(tmp_path, name="", version="run", default_hp_metric=False)
    callback = BayesianMoECallback(["map", Mine()], predict_method="mine")
    module = ToyModule()
    run = trainer(tmp_path, [callback], max_epochs=1, logger=logger)
    run.fit(module, datamodule=ToyDataModule())
    metrics = run.test(module, datamodule=ToyDataModule(), verbose=False)[0]
    assert metrics["mine/test/nll"] != metrics["map/test/nll"]
    events = EventAccumulator(str(tmp_path / "run" / "methods" / "mine"))
    events.Reload()
    assert events.Scalars("test/nll")[0].value == pytest.approx(metrics["mine/test/nll"])
    first = run.predict(module, test_loader())[0]
    assert first["method"] == "mine"
    torch.testing.assert_close(first["log_probs"], callback.predictions["test"]["mine"].log_probs[:16])
    assert "logit_covariance" not in first


def test_one_class_twice_and_two_curvatures_in_one_table(tmp_path):
    attention = Curvature(rank=4, layers=LinearLayers("*.o_proj"))
    methods = [
        "map",
        "laplace_lpo",
        LaplaceLPO(name="lpo_probit", link="probit"),
        LaplaceLPO(name="lpo_attention", curvature=attention),
    ]
    callback = BayesianMoECallback(methods, curvature=Curvature(rank=3), dirpath=str(tmp_path / "b"))
    module = ToyModule()
    run = trainer(tmp_path, [callback], max_epochs=1)
    run.fit(module, train_loader(), calibration_loader())
    metrics = run.test(module, test_loader(), verbose=False)[0]
    values = [metrics[f"{name}/test/nll"] for name in ("map", "laplace_lpo", "lpo_probit", "lpo_attention")]
    assert len(set(values)) == 4
    experts = LaplacePosterior.load(tmp_path / "b" / "posterior.safetensors")
    (path,) = (tmp_path / "b").glob(f"posterior-{attention.digest}-*.safetensors")
    heads = LaplacePosterior.load(path)
    assert {layer.name for layer in experts.factors.layers}.isdisjoint(layer.name for layer in heads.factors.layers)
    assert all(layer.name.endswith("o_proj") for layer in heads.factors.layers)
    alone = BayesianMoECallback([methods[3]], dirpath=str(tmp_path / "b"))
    again = trainer(tmp_path, [alone]).test(module, test_loader(), verbose=False)[0]
    assert again["lpo_attention/test/nll"] == pytest.approx(values[3], rel=1e-6)


def test_fit_posterior_does_what_the_end_of_training_does(tmp_path):
    trained = BayesianMoECallback(["laplace_evidence", "laplace_lpo"], dirpath=str(tmp_path / "b"))
    run = trainer(tmp_path, [trained], max_epochs=1)
    L.seed_everything(0)
    module = ToyModule()
    before = {n: p.detach().clone() for n, p in module.named_parameters() if "experts.down_proj" in n}
    run.fit(module, datamodule=ToyDataModule())
    run.save_checkpoint(tmp_path / "a.ckpt")

    # The run is long over: weights by a checkpoint, the prior mean from the module that it is loaded into.
    later = BayesianMoECallback(["laplace_evidence", "laplace_lpo"], dirpath=str(tmp_path / "c"))
    L.seed_everything(0)
    again = trainer(tmp_path, [])
    later.fit_posterior(ToyModule(), trainer=again, datamodule=ToyDataModule(), ckpt_path=str(tmp_path / "a.ckpt"))
    given = BayesianMoECallback(["laplace_evidence", "laplace_lpo"], dirpath=str(tmp_path / "d"))
    given.fit_posterior(module, trainer=trainer(tmp_path, []), datamodule=ToyDataModule(), prior_mean=before)
    for name in ("laplace_evidence", "laplace_lpo"):
        expected = trained.fitted.methods[name].state["prior_precision"]
        for other in (later, given):
            torch.testing.assert_close(other.fitted.methods[name].state["prior_precision"], expected)
    assert later not in again.callbacks
    assert again.test(again.lightning_module, datamodule=ToyDataModule(), verbose=False)[0].keys() == {"test_loss"}


def test_what_was_not_fitted_is_named_before_anything_is_predicted(tmp_path):
    callback = BayesianMoECallback(("map",), dirpath=str(tmp_path / "b"))
    module = ToyModule()
    trainer(tmp_path, [callback], max_epochs=1).fit(module, train_loader(), calibration_loader())
    more = BayesianMoECallback(("map", "temperature"), dirpath=str(tmp_path / "b"))
    with pytest.raises(NotFittedError, match=r"temperature has not been fitted; call fit_posterior"):
        trainer(tmp_path, [more]).test(module, test_loader(), verbose=False)


class TestPredict:
    @pytest.fixture(scope="class")
    def run(self, tmp_path_factory):
        folder = tmp_path_factory.mktemp("predict")
        methods = ["map", "laplace_lpo", CheckpointEnsemble(num_snapshots=2)]
        callback = BayesianMoECallback(methods, dirpath=str(folder / "b"))
        module = ToyModule()
        run = trainer(folder, [callback])
        run.fit(module, train_loader(), calibration_loader())
        run.test(module, test_loader(), verbose=False)
        return folder, module, callback

    @pytest.mark.parametrize("name", ["map", "laplace_lpo", "checkpoint_ensemble"])
    def test_any_method_can_predict(self, run, name):
        folder, module, tested = run
        callback = BayesianMoECallback(tested.methods, predict_method=name, dirpath=str(folder / "b"))
        before = [p.detach().clone() for p in module.parameters()]
        outputs = trainer(folder, [callback]).predict(module, test_loader())
        assert {output["method"] for output in outputs} == {name}
        found = torch.cat([output["log_probs"] for output in outputs])
        torch.testing.assert_close(found, tested.predictions["test"][name].log_probs, rtol=1e-6, atol=1e-8)
        assert ("logit_covariance" in outputs[0]) == (name == "laplace_lpo")
        assert all(torch.equal(p, q) for p, q in zip(before, module.parameters(), strict=True))

    def test_what_the_module_s_own_step_returned_stays(self, run):
        folder, trained, tested = run

        class Indexed(ToyModule):
            def predict_step(self, batch, batch_idx):
                return {"index": torch.arange(len(batch["labels"])), "logits": "of its own"}

        module = Indexed()
        module.load_state_dict(trained.state_dict())
        callback = BayesianMoECallback(tested.methods, predict_method="map", dirpath=str(folder / "b"))
        first = trainer(folder, [callback]).predict(module, test_loader())[0]
        assert torch.equal(first["index"], torch.arange(16))
        assert first["logits"].shape == (16, len(ANSWER_TOKENS))

    @pytest.mark.parametrize("own", ["no step", "a tensor", "its own index"])
    def test_the_index_of_a_batch_is_returned(self, run, own):
        folder, trained, tested = run

        class Steps(ToyModule):
            def predict_step(self, batch, batch_idx):
                return {"index": "mine"} if own == "its own index" else torch.zeros(2)

        module = ToyModule() if own == "no step" else Steps()
        module.load_state_dict(trained.state_dict())
        batches = [
            {**batch, "index": 16 * number + torch.arange(len(batch["labels"]))}
            for number, batch in enumerate(test_loader())
        ]
        callback = BayesianMoECallback(tested.methods, predict_method="map", dirpath=str(folder / "b"))
        outputs = trainer(folder, [callback]).predict(module, DataLoader(batches, batch_size=None))
        found = [output["index"] for output in outputs]
        if own == "its own index":
            assert found == ["mine"] * len(batches)
        else:
            assert all(torch.equal(one, batch["index"]) for one, batch in zip(found, batches, strict=True))


def test_a_nan_loss_ends_nothing_and_fitting_on_it_is_refused(tmp_path):
    class Broken(ToyModule):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * torch.nan

    run = trainer(tmp_path, [BayesianMoECallback()], max_epochs=2)
    with pytest.raises(ValueError, match="class_logits returned NaN"):
        run.fit(Broken(), train_loader(), calibration_loader())
    assert run.global_step == 2 * TRAIN


def test_states_are_on_the_cpu_and_small(tmp_path):
    callback = BayesianMoECallback(("map", "temperature", "laplace_lpo"))
    trainer(tmp_path, [callback], max_epochs=1).fit(ToyModule(), train_loader(), loader(112, 2))
    for fitted in callback.fitted.methods.values():
        assert all(value.device.type == "cpu" and value.numel() < 10 for value in fitted.state.values())
    assert scalar(2.0).dtype == torch.float64
    assert len(ToyData(4, 1)) == 4


@dataclass(frozen=True)
class Aliasing(Method):
    """Returns a weight, an expanded tensor and one tensor twice, none of which a file or a broadcast can hold."""

    name: str = "aliasing"
    label: str = "Aliasing"

    def fit(self, work):
        weight = next(work.model.parameters())
        return {"weight": weight, "again": weight, "expanded": torch.ones(()).expand(3)}

    def log_probs(self, batch, state):
        return batch.logits.log_softmax(-1)


class TestWhatIsCompared:
    def test_a_state_is_a_copy(self, tmp_path):
        callback, module = BayesianMoECallback((Aliasing(),), dirpath=str(tmp_path / "fit")), ToyModule()
        trainer(tmp_path, [callback], max_epochs=1).fit(module, train_loader(), calibration_loader())
        state = load_fit(tmp_path / "fit")[0].state_of(Aliasing())
        assert torch.equal(state["weight"], next(module.parameters()).detach())
        assert state["expanded"].tolist() == [1, 1, 1]
        kept = callback.fitted.state_of(Aliasing())
        assert kept["weight"].data_ptr() != next(module.parameters()).data_ptr()

    def test_another_seed_is_refused_where_a_fit_is_completed(self, tmp_path):
        module, options = ToyModule(), {"dirpath": str(tmp_path / "fit")}
        data = {"train_dataloaders": train_loader(), "val_dataloaders": calibration_loader()}
        first = BayesianMoECallback(("map", "temperature"), **options)
        trainer(tmp_path, [first], max_epochs=1).fit(module, train_loader(), calibration_loader())
        second = BayesianMoECallback(("map", "temperature", "laplace_lpo"), seed=5, **options)
        with pytest.raises(ValueError, match=r"has seed 0.*seed=5 differs"):
            second.fit_posterior(module, trainer=trainer(tmp_path, [second]), **data)

    def test_too_few_snapshots_leave_out_the_methods_that_need_them(self, tmp_path):
        callback, module = BayesianMoECallback(("map", "temperature", "checkpoint_ensemble")), ToyModule()
        run = trainer(tmp_path, [callback], max_epochs=3)

        class Stop(L.Callback):
            def on_train_epoch_end(self, trainer, pl_module):
                trainer.should_stop = True

        run.callbacks.append(Stop())
        with pytest.warns(UserWarning, match="1 snapshots, too few for checkpoint_ensemble"):
            run.fit(module, train_loader(), calibration_loader())
        assert set(callback.fitted.methods) == {"temperature"}
        with pytest.raises(NotFittedError, match="checkpoint_ensemble has not been fitted"):
            run.test(module, test_loader(), verbose=False)

    def test_a_trial_predicts_with_what_it_could_fit(self, tmp_path):
        callback, module = BayesianMoECallback(("map", "swag")), ToyModule()
        run = trainer(tmp_path, [callback], fast_dev_run=True)
        with pytest.warns(UserWarning, match="too few for swag"):
            run.fit(module, train_loader(), calibration_loader())
        assert "map/test/nll" in run.test(module, test_loader(), verbose=False)[0]

    def test_an_added_method_asks_for_its_own_data_alone(self, tmp_path):
        module, folder = ToyModule(), str(tmp_path / "fit")
        first = BayesianMoECallback(("map", "laplace_lpo"), dirpath=folder)
        trainer(tmp_path, [first], max_epochs=1).fit(module, train_loader(), calibration_loader())
        methods = ("map", "laplace_lpo", LaplaceEvidence(prior_mean="zero"))
        second = BayesianMoECallback(methods, dirpath=folder)
        second.fit_posterior(module, trainer=trainer(tmp_path, [second]), train_dataloaders=train_loader())
        assert "laplace_evidence" in load_fit(tmp_path / "fit")[0].methods

    def test_evidence_temperature_predicts_by_a_plain_forward(self, tmp_path):
        class NoGradient(ToyModule):
            def class_logits(self, batch):
                logits, labels = super().class_logits(batch)
                self.with_gradient = logits.requires_grad
                return logits, labels

        module = NoGradient()
        callback = BayesianMoECallback(("evidence_temperature",))
        run = trainer(tmp_path, [callback], max_epochs=1)
        run.fit(module, train_loader(), loader(120, 2))
        run.test(module, test_loader(), verbose=False)
        assert not module.with_gradient

    def test_two_callbacks_of_one_dirpath_have_a_folder_each(self, tmp_path):
        both = [BayesianMoECallback(("temperature",), name=name, dirpath=str(tmp_path / "fit")) for name in "ab"]
        trainer(tmp_path, both, max_epochs=1).fit(ToyModule(), train_loader(), calibration_loader())
        assert {path.parent.name for path in (tmp_path / "fit").rglob("index.json")} == {"a", "b"}


class TestPredictStep:
    def test_that_of_an_instance_is_called_and_put_back(self, tmp_path):
        module, callback = ToyModule(), BayesianMoECallback(("map",), predict_method="map")
        run = trainer(tmp_path, [callback], max_epochs=1)
        run.fit(module, train_loader(), calibration_loader())

        def own(batch, batch_idx):
            return {"index": batch_idx}

        module.predict_step = own
        outputs = run.predict(module, test_loader())
        assert [output["index"] for output in outputs] == list(range(len(outputs)))
        assert {output["method"] for output in outputs} == {"map"}
        assert module.predict_step is own

    def test_two_callbacks_that_would_predict_are_refused(self, tmp_path):
        module = ToyModule()
        both = [BayesianMoECallback(("map",), name=name, predict_method="map") for name in "ab"]
        run = trainer(tmp_path, both, max_epochs=1)
        run.fit(module, train_loader(), calibration_loader())
        with pytest.raises(ValueError, match="two callbacks have a predict_method"):
            run.predict(module, test_loader())
        assert "predict_step" not in vars(module)
