"""The callback for modules that write text, in a trainer of a user's own."""

from __future__ import annotations

import warnings

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader, Dataset
from toy import ToyModule, toy_model, trainer

from bmoe_lightning import BayesianMoECallback, BayesianTextCallback, LaplacePosterior
from bmoe_lightning.curvature import Curvature, collect_text_factors
from bmoe_lightning.models import sequence_log_prob
from bmoe_lightning.text_callback import text_methods

EMPIRICAL = Curvature(rank=4, fisher="empirical")


class Texts(Dataset):
    """Prompts of three tokens and answers of two or three."""

    def __init__(self, size, seed):
        generator = torch.Generator().manual_seed(seed)
        self.ids = torch.randint(1, 24, (size, 6), generator=generator)
        self.lengths = torch.randint(2, 4, (size,), generator=generator) + 3

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        mask = (torch.arange(6) < self.lengths[index]).long()
        return {
            "input_ids": self.ids[index] * mask,
            "attention_mask": mask,
            "answer_mask": mask * (torch.arange(6) >= 3),
            "index": index,
        }


def loader(size, seed):
    return DataLoader(Texts(size, seed), batch_size=8)


class TextModule(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = toy_model()

    def sequence_log_prob(self, batch):
        return sequence_log_prob(self.model, batch)

    def training_step(self, batch):
        return -self.sequence_log_prob(batch).mean()

    def predict_step(self, batch, batch_idx):
        return {"lengths": batch["answer_mask"].sum(1)}

    def validation_step(self, batch):
        self.log("val_loss", -self.sequence_log_prob(batch).mean())

    test_step = validation_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-2)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A module that was trained with the callback, and the callback."""
    folder = tmp_path_factory.mktemp("run")
    L.seed_everything(0, verbose=False)
    module, callback = TextModule(), BayesianTextCallback(dirpath=str(folder / "fit"), curvature=EMPIRICAL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer(folder, [callback], max_epochs=1).fit(module, loader(24, 0), loader(8, 1))
    return module, callback, folder


@pytest.mark.filterwarnings("ignore")
def test_predictions_are_those_of_the_posterior_that_was_written(run):
    module, callback, folder = run
    batches = trainer(folder, [callback], max_epochs=1).predict(module, loader(16, 2))
    posterior = LaplacePosterior.load(folder / "fit" / "posterior.safetensors")
    for found, batch in zip(batches, loader(16, 2), strict=True):
        expected = posterior.sequence_variance(module.model, sequence_log_prob, batch)
        for name in ("log_prob", "variance", "isotropic"):
            torch.testing.assert_close(found[name], getattr(expected, name), rtol=1e-5, atol=1e-9)
        assert found["lengths"].tolist() == batch["answer_mask"].sum(1).tolist()
        assert found["index"].tolist() == batch["index"].tolist()
        assert bool((found["variance"] > 0).all())
    assert "predict_step" not in vars(module)  # of the class again


@pytest.mark.filterwarnings("ignore")
def test_the_curvature_is_that_of_the_training_texts(run):
    module, _, folder = run
    posterior = LaplacePosterior.load(folder / "fit" / "posterior.safetensors")
    factors = collect_text_factors(module.model, sequence_log_prob, loader(24, 0), rank=4)
    for found, expected in zip(posterior.factors.layers, factors.layers, strict=True):
        torch.testing.assert_close(found.curvature(), expected.curvature(), rtol=1e-3, atol=1e-6)
    assert posterior.factors.num_examples == 24


@pytest.mark.filterwarnings("ignore")
def test_validation_and_test_log_what_the_module_logs(run):
    module, callback, folder = run
    for evaluate in ("validate", "test"):
        (found,) = getattr(trainer(folder, [callback], max_epochs=1), evaluate)(module, loader(8, 1), verbose=False)
        assert set(found) == {"val_loss"}


def test_methods_that_need_classes_are_refused():
    with pytest.raises(ValueError, match="laplace_lpo needs probabilities of classes") as found:
        BayesianTextCallback("laplace_lpo")
    assert str(found.value).endswith(f"without them are {', '.join(text_methods())}")
    for method in ("map", "temperature", "isotropic", "deep_ensemble", "router_noise"):
        with pytest.raises(ValueError, match=f"{method} needs probabilities of classes"):
            BayesianTextCallback(method)


def test_the_labels_of_texts_are_the_texts():
    with pytest.raises(ValueError, match="fisher='exact', which needs probabilities of classes"):
        BayesianTextCallback(curvature=Curvature())


@pytest.mark.filterwarnings("ignore")
def test_modules_are_told_apart(tmp_path):
    with pytest.raises(TypeError, match="ToyModule has no method sequence_log_prob"):
        trainer(tmp_path, [BayesianTextCallback()]).fit(ToyModule(), loader(8, 0))
    with pytest.raises(TypeError, match="sequence_log_prob: for texts there is BayesianTextCallback"):
        trainer(tmp_path, [BayesianMoECallback()]).fit(TextModule(), loader(8, 0))
