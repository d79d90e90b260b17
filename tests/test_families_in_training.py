"""Families of other layouts than Qwen's through the trainer, and posteriors elsewhere than on routed experts."""

import pytest
import torch
from toy import ANSWER_TOKENS, ToyModule, calibration_loader, test_loader, train_loader, trainer

from bmoe_lightning import ExpertFinetuner
from bmoe_lightning.callback import BayesianMoECallback
from bmoe_lightning.curvature.spec import Curvature, ExpertLayers, LinearLayers
from bmoe_lightning.experts import find_expert_layers, find_linear_layers
from bmoe_lightning.methods import NotFittedError
from recipes.supported_models.tiny import build

METHODS = ("map", "mc_dropout", "laplace_evidence", "laplace_lpo")


def renamed(loader):
    """The toy data in the columns that `ExpertFinetuner` reads."""

    def collate(items):
        ids = torch.stack([item["input_ids"] for item in items])
        labels = torch.stack([item["labels"] for item in items])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "label": labels}

    return torch.utils.data.DataLoader(loader.dataset, batch_size=16, collate_fn=collate)


@pytest.mark.parametrize("family", ["gpt_oss", "nemotron_h", "muse_spark", "llama4", "jetmoe", "dbrx", "longcat_flash"])
@pytest.mark.parametrize("part", ["experts", "down_proj"])
def test_fine_tuning_and_posterior(family, part, tmp_path):
    model = build(family).model.float()
    module = ExpertFinetuner(model, answer_token_ids=ANSWER_TOKENS, train=part, learning_rate=1e-2)
    layers = find_expert_layers(model)
    trained = {p.data_ptr() for p in module.trained_parameters().values()}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    callback = BayesianMoECallback(methods=METHODS, curvature=Curvature(rank=4), dirpath=str(tmp_path / "bayesian"))
    run = trainer(tmp_path, [callback], max_epochs=1)
    run.fit(module, renamed(train_loader()), renamed(calibration_loader()))
    (metrics,) = run.test(module, renamed(test_loader()), verbose=False)
    for method in METHODS:
        assert metrics[f"{method}/test/nll"] < 20
    assert metrics["mc_dropout/test/nll"] != metrics["map/test/nll"]
    for name, parameter in model.named_parameters():
        moved = not torch.equal(parameter.detach(), before[name])
        assert moved == (parameter.data_ptr() in trained), name
    (posterior,) = callback.fitted.posteriors.values()
    assert [layer.num_experts for layer in posterior.factors.layers] == [layer.num_experts for layer in layers]
    assert all(float(layer.slots.sum()) > 0 for layer in posterior.factors.layers)
    assert "forward" not in vars(model.get_submodule(layers[0].name))


@pytest.mark.parametrize(
    ("selection", "layers", "said"),
    [
        (LinearLayers("*.self_attn.?_proj"), 8, "layers.selection=.*LinearLayers"),
        (LinearLayers("*.lm_head"), 1, "layers.selection=.*LinearLayers"),
        (ExpertLayers(shared_experts=True), 4, "layers.shared_experts=True"),
    ],
    ids=str,
)
def test_posteriors_elsewhere(selection, layers, said, tmp_path):
    curvature, folder = Curvature(layers=selection), str(tmp_path / "bayesian")
    callback = BayesianMoECallback(METHODS, curvature, dirpath=folder)
    module = ToyModule()
    run = trainer(tmp_path, [callback], max_epochs=1)
    run.fit(module, train_loader(), calibration_loader())
    (metrics,) = run.test(module, test_loader(), verbose=False)
    factors = callback.fitted.posteriors[curvature.digest].factors
    assert len(factors.layers) == layers
    assert metrics["laplace_evidence/test/nll"] != metrics["map/test/nll"]

    again = BayesianMoECallback(METHODS, curvature, dirpath=folder)
    (loaded,) = trainer(tmp_path, [again]).test(module, test_loader(), verbose=False)
    assert loaded == pytest.approx(metrics, rel=1e-4)
    other = BayesianMoECallback(METHODS, dirpath=folder)
    with pytest.raises(NotFittedError, match=f"other options: .*{said}"):
        trainer(tmp_path, [other]).test(module, test_loader(), verbose=False)


def test_a_pattern_without_a_layer_is_refused_before_training(tmp_path):
    callback = BayesianMoECallback(METHODS, Curvature(layers=LinearLayers("*.nothing")))
    with pytest.raises(ValueError, match=r"no linear layer of ToyModule matches '\*.nothing'"):
        trainer(tmp_path, [callback]).fit(ToyModule(), train_loader(), calibration_loader())
    assert len(find_linear_layers(ToyModule(), "*.?_proj")) == 8
