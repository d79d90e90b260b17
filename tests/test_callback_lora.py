"""The callback on runs that fine-tune with LoRA, whose curvatures need not cover any expert."""

from dataclasses import replace

import pytest
import torch
from finetuner_cases import trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2MoeForCausalLM

from bmoe_lightning import BayesianMoECallback, ExpertFinetuner, LaplacePosterior, LoRAFinetuner
from bmoe_lightning.curvature import Curvature, LoRALayers
from bmoe_lightning.data import MultipleChoiceDataModule, Splits
from bmoe_lightning.methods import BayesianLoRA, LaplaceEvidence, MCDropout, read_snapshot
from bmoe_lightning.methods.needs import NeedsError
from recipes.qwen_obqa.builtin_model import small_moe_config
from recipes.qwen_obqa.builtin_task import World

pytest.importorskip("peft")

WORLD = World(seed=3, kinds=4, creatures_per_kind=10, features=3, fit_items=24, calibration_items=16)
METHODS = (
    "map",
    MCDropout(num_samples=3),
    "checkpoint_ensemble",
    "temperature",
    "laplace_lpo",
    "bayesian_lora",
    LaplaceEvidence(name="lora_evidence", curvature=Curvature(rank=8, layers=LoRALayers())),
)
NAMES = ("map", "mc_dropout", "checkpoint_ensemble", "temperature", "laplace_lpo", "bayesian_lora", "lora_evidence")

pytestmark = pytest.mark.filterwarnings("ignore:LPO ended at the limit", "ignore:the fitted temperature")


@pytest.fixture(scope="module")
def tokenizer():
    return WORLD.tokenizer()


@pytest.fixture
def data(tokenizer):
    return made(tokenizer)


def made(tokenizer):
    splits = Splits(WORLD.questions("fit"), WORLD.questions("calibration"), WORLD.questions("test")[:12])
    return MultipleChoiceDataModule(splits, tokenizer, prompt="letters", batch_size=8, eval_batch_size=8)


def small_model(tokenizer):
    """The small model of the main job before it is pre-trained; its head is tied to its embeddings."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Qwen2MoeForCausalLM(small_moe_config(len(tokenizer), layers=2, hidden_size=16, experts=4))


def finetuner(tokenizer, **options):
    return LoRAFinetuner(small_model(tokenizer), **{"learning_rate": 0.01, **options})


def callback(folder, methods=METHODS, **options):
    return BayesianMoECallback(methods, curvature=Curvature(rank=8), dirpath=str(folder), **options)


class Run:
    """A run of two epochs with all methods, and what a test of it logs."""

    def __init__(self, folder, tokenizer):
        self.folder, self.tokenizer, self.data = folder, tokenizer, made(tokenizer)
        self.module = finetuner(tokenizer)
        self.callback = callback(folder / "b", predict_method="bayesian_lora")
        self.saver = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
        run = trainer(folder, self.callback, self.saver, max_epochs=2)
        run.fit(self.module, datamodule=self.data)
        self.weights = {name: p.detach().clone() for name, p in self.module.trained_parameters().items()}
        self.metrics = run.test(self.module, datamodule=self.data, verbose=False)[0]
        self.predicted = run.predict(self.module, datamodule=self.data)


@pytest.fixture(scope="module")
def run(tmp_path_factory, tokenizer):
    return Run(tmp_path_factory.mktemp("lora"), tokenizer)


class TestTable:
    def test_has_every_method(self, run):
        for name in NAMES:
            for metric in ("acc", "ece", "nll", "brier"):
                assert 0 <= run.metrics[f"{name}/test/{metric}"] < 10
        losses = {name: run.metrics[f"{name}/test/nll"] for name in NAMES}
        assert len(set(losses.values())) == len(NAMES), "two methods predict the same"
        assert torch.isfinite(torch.tensor(list(losses.values()))).all()

    def test_predicts_with_the_posterior(self, run):
        found = torch.cat([part["log_probs"] for part in run.predicted])
        expected = run.callback.predictions["test"]["bayesian_lora"].log_probs
        torch.testing.assert_close(found, expected)

    def test_snapshots_hold_the_matrices(self, run):
        found = sorted((run.folder / "b" / "snapshots").glob("*.safetensors"))
        assert len(found) == 2
        assert all(read_snapshot(path).keys() == run.weights.keys() for path in found)
        assert all(torch.equal(value, run.weights[name]) for name, value in read_snapshot(found[-1]).items())

    def test_each_posterior_has_a_file_over_its_layers(self, run):
        files = sorted((run.folder / "b").glob("posterior*.safetensors"))
        layers = [{layer.name for layer in LaplacePosterior.load(path).factors.layers} for path in files]
        matrices = {name.removesuffix(".weight") for name in run.weights}
        assert matrices in layers
        assert any(all(name.endswith("mlp.experts") for name in names) for names in layers)
        assert len(layers) == 2

    def test_the_prior_mean_is_what_training_began_with(self, run):
        """A as it was drawn, and zero for B."""
        began = finetuner(run.tokenizer)
        began.configure_model()
        mean = run.callback._prior_mean.weights
        assert mean.keys() == run.weights.keys()
        assert all(torch.equal(mean[name], p.detach()) for name, p in began.trained_parameters().items())
        assert all(mean[name].any() == (".lora_A." in name) for name in mean)

    def test_the_posterior_covers_all_that_is_trained(self, run):
        fit = run.callback.fitted
        shares = {p.factors.expert_layers[0].layout: fit.shares[digest].share for digest, p in fit.posteriors.items()}
        assert shares == {"linear": 1.0, "fused": 0.0}

    def test_nothing_stays_in_the_model(self, run):
        assert all(torch.equal(p.detach(), run.weights[name]) for name, p in run.module.trained_parameters().items())
        assert {name for name, p in run.module.named_parameters() if p.requires_grad} == run.weights.keys()
        assert all(p.grad is None for name, p in run.module.named_parameters() if name not in run.weights)


class TestLater:
    AGAIN = (BayesianLoRA(name="again"), replace(METHODS[-1], name="evidence_again"))

    def test_a_fit_to_the_checkpoint_of_training_is_the_same(self, run, tmp_path):
        other = callback(tmp_path / "b", self.AGAIN)
        other.fit_posterior(
            finetuner(run.tokenizer),
            trainer=trainer(tmp_path, other),
            datamodule=run.data,
            ckpt_path=str(run.folder / "epoch=1.ckpt"),
        )
        for method, before in zip(other.methods, run.callback.methods[-2:], strict=True):
            expected = run.callback.fitted.state_of(before)["prior_precision"]
            torch.testing.assert_close(other.fitted.state_of(method)["prior_precision"], expected, rtol=1e-4, atol=0)

    def test_another_beginning_is_told(self, run, tmp_path):
        other = callback(tmp_path / "b", self.AGAIN[1:])
        with pytest.raises(NeedsError, match=r"other weights than before training in 5 of 10 .*lora_A"):
            other.fit_posterior(
                finetuner(run.tokenizer, seed=1),
                trainer=trainer(tmp_path, other),
                datamodule=run.data,
                ckpt_path=str(run.folder / "epoch=1.ckpt"),
            )

    def test_resumes(self, run, tmp_path):
        other = callback(tmp_path / "b", ["map", "checkpoint_ensemble", METHODS[-1]])
        module = finetuner(run.tokenizer)
        trainer(tmp_path, other, max_epochs=2).fit(
            module, datamodule=run.data, ckpt_path=str(run.folder / "epoch=0.ckpt")
        )
        mean = other._prior_mean.weights
        assert all(torch.equal(value, mean[name]) for name, value in run.callback._prior_mean.weights.items())
        assert other.fitted.is_fitted(other.methods[-1])
        assert len(list((tmp_path / "b" / "snapshots").glob("*.safetensors"))) == 2


class TestRefusals:
    """Before the first step."""

    @pytest.mark.parametrize(
        ("make", "method", "message"),
        [
            (lambda t: ExpertFinetuner(small_model(t)), "bayesian_lora", "no layer with an active, unmerged LoRA"),
            (finetuner, MCDropout(p=0.2), "dropout probability of 0.2, and the LoRA of this model is trained with 0.1"),
            (lambda t: finetuner(t, dropout=0.0), "mc_dropout", "LoRA of this model is trained with 0.0"),
        ],
        ids=["no LoRA", "another dropout", "no dropout"],
    )
    def test_what_cannot_be_fitted(self, data, tokenizer, tmp_path, make, method, message):
        module = make(tokenizer)
        steps = []
        module.training_step = lambda *_: steps.append(0)
        with pytest.raises(ValueError, match=message):
            trainer(tmp_path, callback(tmp_path / "b", ["map", method])).fit(module, datamodule=data)
        assert steps == []


def test_a_dense_model_needs_no_experts(data, tokenizer, tmp_path):
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    module = LoRAFinetuner(LlamaForCausalLM(config), learning_rate=0.01)
    fitting = callback(tmp_path / "b", ["map", "mc_dropout", "temperature", "bayesian_lora"])
    run = trainer(tmp_path, fitting)
    run.fit(module, datamodule=data)
    metrics = run.test(module, datamodule=data, verbose=False)[0]
    assert metrics["bayesian_lora/test/nll"] != metrics["map/test/nll"]
