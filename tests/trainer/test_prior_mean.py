"""The pretrained weights are captured once for each module, before a checkpoint overwrites them."""

from __future__ import annotations

import pickle
import warnings

import lightning as L
import pytest
import torch
from fake_trainer import FakeTrainer
from lightning.pytorch.callbacks import LearningRateFinder, ModelCheckpoint
from toy import ToyModule, calibration_loader, loader, train_loader, trainer

from bmoe_lightning import BayesianMoECallback
from bmoe_lightning.curvature import Curvature
from bmoe_lightning.methods import MAP, LaplaceEvidence
from bmoe_lightning.methods.needs import NeedsError
from bmoe_lightning.trainer.prior_mean import PriorMean

DOWN = "network.model.layers.0.mlp.experts.down_proj"
EVIDENCE = LaplaceEvidence(curvature=Curvature())
REFUSED = (
    r"other weights than before training in 2 of 2 layers \(network.*laplace_evidence measure how far.*"
    r"rather than with load_from_checkpoint; or use prior_mean='zero'"
)


def test_copies_on_the_cpu():
    module = ToyModule()
    prior_mean = PriorMean([EVIDENCE])
    assert prior_mean.weights is None
    prior_mean.capture(module)
    before = module.get_parameter(DOWN).detach().clone()
    torch.nn.init.zeros_(module.get_parameter(DOWN))
    assert prior_mean.is_of(module)
    assert torch.equal(prior_mean.weights[DOWN], before)
    assert len(prior_mean.weights) == 2


def test_captured_once_for_each_module():
    module, other = ToyModule(), ToyModule(seed=1)
    prior_mean = PriorMean([EVIDENCE])
    prior_mean.capture(module)
    first = prior_mean.weights
    prior_mean.capture(module)
    assert prior_mean.weights is first
    prior_mean.capture(other)
    assert prior_mean.is_of(other)
    assert not prior_mean.is_of(module)
    assert torch.equal(prior_mean.weights[DOWN], other.get_parameter(DOWN))


def test_nothing_is_captured_unless_needed_nor_without_experts():
    without_experts = torch.nn.Linear(2, 2)
    for methods, module in (([MAP()], ToyModule()), ([EVIDENCE], without_experts)):
        prior_mean = PriorMean(methods)
        prior_mean.capture(module)
        assert prior_mean.weights is None
        assert prior_mean.is_of(module) == (module is not without_experts)


@pytest.mark.parametrize("restoring", [False, True])
def test_on_load_of_a_checkpoint_alone(restoring):
    module = ToyModule()
    before = module.get_parameter(DOWN).detach().clone()
    prior_mean = PriorMean([EVIDENCE])
    prior_mean.capture_on_load(FakeTrainer(restoring=restoring), module)
    module.load_state_dict(ToyModule(seed=1).state_dict())
    assert prior_mean.is_of(module) == restoring
    if restoring:
        assert torch.equal(prior_mean.weights[DOWN], before)


def test_hook_is_removed():
    module = ToyModule()
    prior_mean = PriorMean([EVIDENCE])
    prior_mean.remove_hook()
    prior_mean.capture_on_load(FakeTrainer(restoring=True), module)
    prior_mean.remove_hook()
    prior_mean.remove_hook()
    module.load_state_dict(ToyModule(seed=1).state_dict())
    assert prior_mean.weights is None


def test_can_be_pickled_without_its_module():
    """For strategies that spawn processes."""
    module = ToyModule()
    prior_mean = PriorMean([EVIDENCE])
    prior_mean.capture(module)
    prior_mean.capture_on_load(FakeTrainer(restoring=True), module)
    written = pickle.dumps(prior_mean)
    found = pickle.loads(written)
    assert found.weights.keys() == prior_mean.weights.keys()
    assert torch.equal(found.weights[DOWN], prior_mean.weights[DOWN])
    assert not found.is_of(module)
    assert prior_mean.is_of(module)
    assert len(written) < 2 * sum(value.nbytes for value in prior_mean.weights.values()) + 10_000


def checked(before, module):
    """A record of one module, in a checkpoint of a run that resumes with another module."""
    first, second = PriorMean([EVIDENCE]), PriorMean([EVIDENCE])
    first.capture(before)
    second.load_state_dict(first.state_dict())
    second.capture(module)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second.check(FakeTrainer(), module, [EVIDENCE], trains=True)


@pytest.mark.parametrize(
    ("dtype", "other"), [(torch.float16, torch.bfloat16), (torch.float32, torch.float16), (torch.bfloat16,) * 2]
)
def test_one_model_in_two_precisions(dtype, other):
    for one, two in ((dtype, other), (other, dtype)):
        checked(ToyModule().to(one), ToyModule().to(two))
        moved = ToyModule()
        with torch.no_grad():
            for weight in moved.parameters():
                weight.add_(5e-5 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)).sign())
        with pytest.raises(NeedsError, match=REFUSED):
            checked(ToyModule().to(one), moved.to(two))


def test_adapters_of_a_narrow_model():
    """Merged in float32, with the rounding of the model's own precision."""
    peft = pytest.importorskip("peft")
    config = {"r": 2, "target_modules": [], "target_parameters": ["mlp.experts.down_proj"]}

    def adapted(dtype):
        module = ToyModule()
        module.network.to(dtype)
        module.network = peft.get_peft_model(module.network, peft.LoraConfig(**config))
        return module

    checked(adapted(torch.float32), adapted(torch.bfloat16))
    checked(adapted(torch.bfloat16), adapted(torch.float16))
    other = adapted(torch.bfloat16)
    for name, parameter in other.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.01)
    with pytest.raises(NeedsError, match="other weights than before training in 2 of 2 layers"):
        checked(adapted(torch.float32), other)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Checkpoints of trainings of one epoch."""
    folder = tmp_path_factory.mktemp("trained")
    for name, methods in (("evidence", [LaplaceEvidence()]), ("default", ["map"]), ("none", None)):
        callbacks = [] if methods is None else [BayesianMoECallback(methods, dirpath=str(folder / name))]
        saves = ModelCheckpoint(folder, filename=name)
        run = trainer(folder, [*callbacks, saves], max_epochs=1, enable_checkpointing=True)
        L.seed_everything(0)
        run.fit(ToyModule(), loader(160, 1), calibration_loader())
    return folder


class TestResumed:
    """Of a run that resumes, the module has to begin with the weights that it had before training."""

    def resumed(self, path, folder, methods=("laplace_evidence",), module=None, epochs=2, **options):
        callback = BayesianMoECallback(methods, dirpath=str(folder / "resumed"))
        run = trainer(folder, [callback, *options.pop("callbacks", ())], max_epochs=epochs, **options)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run.fit(module or ToyModule(), loader(160, 1), calibration_loader(), ckpt_path=str(path), weights_only=True)
        return callback, [str(w.message) for w in caught if "before training" in str(w.message)]

    def other(self, kind, path):
        """A module with other weights than those from before training."""
        if kind == "initialisation":
            return ToyModule(seed=8)
        module = ToyModule.load_from_checkpoint(path, weights_only=True)
        if kind == "half precision":
            module.to(torch.bfloat16)
        return module

    @pytest.mark.parametrize("kind", ["load_from_checkpoint", "initialisation", "half precision"])
    @pytest.mark.parametrize("record", ["evidence", "default"])
    def test_other_weights_are_refused_before_the_first_step(self, runs, tmp_path, kind, record):
        """Whichever methods the checkpoint's run had."""
        path = runs / f"{record}.ckpt"
        module = self.other(kind, path)
        with pytest.raises(NeedsError, match=REFUSED):
            self.resumed(path, tmp_path, module=module)
        expected = {name: weight.to(module.dtype) for name, weight in torch.load(path)["state_dict"].items()}
        assert all(torch.equal(value, expected[name]) for name, value in module.state_dict().items())
        assert not (tmp_path / "resumed").exists()

    @pytest.mark.parametrize("record", ["evidence", "default"])
    def test_the_same_weights_are_accepted(self, runs, tmp_path, record):
        path = runs / f"{record}.ckpt"
        callback, warned = self.resumed(path, tmp_path)
        assert callback.fitted is not None
        assert warned == []
        assert callback.state_dict()["prior_mean"] == self.record(path)

    def test_the_same_weights_after_another_rounding_are_accepted(self, runs, tmp_path):
        """As adapters that are merged on another machine."""
        module = ToyModule()
        with torch.no_grad():
            for name, weight in module.named_parameters():
                if "experts.down_proj" in name:
                    weight.mul_(1 + 1e-7 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
        assert not torch.equal(module.get_parameter(DOWN), ToyModule().get_parameter(DOWN))
        callback, warned = self.resumed(runs / "evidence.ckpt", tmp_path, module=module)
        assert callback.fitted is not None
        assert warned == []

    def test_digests_of_an_earlier_version_are_no_record(self, runs):
        prior_mean = PriorMean([EVIDENCE])
        prior_mean.load_state_dict(
            {"prior_mean": {DOWN.removesuffix(".down_proj"): ["float32", {"float32": "0" * 16}]}}
        )
        prior_mean.capture(ToyModule())
        with pytest.warns(UserWarning, match="the checkpoint has no record of the weights from before training"):
            prior_mean.check(FakeTrainer(), ToyModule(), [EVIDENCE], trains=True)

    def record(self, path):
        (state,) = [s for name, s in torch.load(path)["callbacks"].items() if name.startswith("BayesianMoECallback")]
        return state["prior_mean"]

    @pytest.mark.parametrize("methods", [[LaplaceEvidence(prior_mean="zero")], ["map"]])
    def test_methods_that_do_not_use_them_accept_others_and_pass_the_record_on(self, runs, tmp_path, methods):
        path = runs / "evidence.ckpt"
        again = tmp_path / "again.ckpt"
        saves = ModelCheckpoint(tmp_path, filename="again")
        self.resumed(path, tmp_path, methods, ToyModule(seed=8), callbacks=[saves], enable_checkpointing=True)
        assert self.record(again) == self.record(path)
        self.resumed(again, tmp_path / "third", epochs=3)
        with pytest.raises(NeedsError, match=REFUSED):
            self.resumed(again, tmp_path / "other", module=ToyModule(seed=8), epochs=3)

    def test_a_checkpoint_without_a_record_is_warned_of_once(self, runs, tmp_path):
        callback, warned = self.resumed(runs / "none.ckpt", tmp_path, [LaplaceEvidence(), MAP()])
        assert callback.fitted is not None
        (sentence,) = warned
        assert (
            "no record of the weights from before training, the prior mean of laplace_evidence; they are taken"
            in sentence
        )
        assert "prior_mean" not in callback.state_dict()
        assert self.resumed(runs / "none.ckpt", tmp_path / "zero", [LaplaceEvidence(prior_mean="zero")])[1] == []

    @pytest.mark.parametrize("damage", [3, {"network": 3}, {"network": ["float32"]}, {"network": ["float32", [1]]}])
    def test_a_damaged_record_is_refused(self, runs, damage):
        callback = BayesianMoECallback(["map"])
        with pytest.raises(ValueError, match="record of the weights from before training is damaged"):
            callback.load_state_dict({"folder": str(runs), "prior_mean": damage})

    @pytest.mark.parametrize("kind", ["load_from_checkpoint", "initialisation"])
    def test_fit_posterior_refuses_other_weights(self, runs, tmp_path, kind):
        path = runs / "default.ckpt"

        def fit(module, **options):
            callback = BayesianMoECallback(["laplace_evidence", "evidence_temperature"], dirpath=str(tmp_path / "b"))
            loaders = {"train_dataloaders": loader(160, 1), "val_dataloaders": calibration_loader()}
            run = trainer(tmp_path, [callback])
            callback.fit_posterior(module, trainer=run, ckpt_path=str(path), **loaders, **options)
            return callback.fitted.methods["laplace_evidence"].state["prior_precision"]

        with pytest.raises(NeedsError, match="laplace_evidence, evidence_temperature measure how far"):
            fit(self.other(kind, path))
        expected = fit(ToyModule())
        before = {name: p.detach() for name, p in ToyModule().named_parameters() if "experts.down_proj" in name}
        (tmp_path / "b" / "index.json").unlink()
        torch.testing.assert_close(fit(self.other(kind, path), prior_mean=before), expected)

    def test_a_model_that_is_already_trained_leaves_no_record(self, runs, tmp_path):
        callback = BayesianMoECallback(["map"], dirpath=str(tmp_path / "b"))
        run = trainer(tmp_path, [callback])
        module = ToyModule.load_from_checkpoint(runs / "none.ckpt", weights_only=True)
        callback.fit_posterior(module, trainer=run, train_dataloaders=train_loader())
        assert "prior_mean" not in callback.state_dict()

    def test_a_learning_rate_finder_that_restores_the_run_is_no_resumption(self, tmp_path):
        finder = LearningRateFinder(num_training_steps=4, attr_name="learning_rate")
        callback = BayesianMoECallback(["laplace_evidence"], dirpath=str(tmp_path / "b"))
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "the checkpoint has no record")
            trainer(tmp_path, [finder, callback], max_epochs=1).fit(ToyModule(), train_loader(), calibration_loader())
        assert callback.state_dict()["prior_mean"]

    def test_a_refused_checkpoint_says_nothing_of_the_next_training(self, runs, tmp_path):
        callback = BayesianMoECallback(["laplace_evidence"], dirpath=str(tmp_path / "b"))
        path = runs / "evidence.ckpt"
        with pytest.raises(NeedsError):
            trainer(tmp_path, [callback]).fit(
                ToyModule(seed=8), train_loader(), calibration_loader(), ckpt_path=str(path), weights_only=True
            )
        trainer(tmp_path, [callback], max_epochs=1).fit(ToyModule(seed=8), train_loader(), calibration_loader())
        (state,) = [s for n, s in torch.load(path)["callbacks"].items() if n.startswith("BayesianMoECallback")]
        assert callback.fitted.fit_id != state["fit"]
        assert callback.state_dict()["prior_mean"] != state["prior_mean"]
