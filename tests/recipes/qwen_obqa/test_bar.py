"""What is promised of the built-in task: the posterior calibrates, and drawn experts keep a temperature."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

from bmoe_lightning.methods import TemperatureRouter
from bmoe_lightning.methods.router_training import RouterPasses
from bmoe_lightning.routers import TemperatureChoice, choice_ways, find_routers, probe_routers
from bmoe_lightning.trainer.data_passes import TrainerTrainingData
from bmoe_lightning.utils.fit_warnings import collected_fit_warnings
from recipes.qwen_obqa.__main__ import main
from recipes.qwen_obqa.experiment import completed_run
from recipes.qwen_obqa.settings import Settings

METHODS = ("map", "mc_dropout", "temperature", "laplace_lpo", "evidence_temperature")
# Neither among the seeds that the README reports nor among those on which the settings were chosen.
SEED = 200


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bar") / "run"
    arguments = ["--quiet", "--output-dir", str(folder), "--first-seed", str(SEED), "--accelerator", "cpu"]
    assert main([*arguments, "--methods", ",".join(METHODS)]) == 0
    return folder


@pytest.mark.slow
def test_the_posterior_calibrates_an_over_confident_model(folder):
    rows = {row["method"]: row for row in json.loads((folder / "results.json").read_text())["rows"]}
    plain, laplace, temperature = rows["map"], rows["laplace_lpo"], rows["temperature"]
    assert plain["acc"]["mean"] > 0.5
    assert plain["ece"]["mean"] > 0.1, "the model that methods start from is over-confident"
    # How much depends on the pre-trained model, which differs between machines. Temperature scaling tells what there
    # is to win: the posterior, fitted on the same labels, wins as much.
    assert laplace["nll"]["mean"] < 1.05 * temperature["nll"]["mean"]
    assert laplace["nll"]["mean"] < rows["mc_dropout"]["nll"]["mean"] < plain["nll"]["mean"]
    assert laplace["ece"]["mean"] < plain["ece"]["mean"]
    assert abs(laplace["acc"]["mean"] - plain["acc"]["mean"]) < 0.03
    # Without labels it may be too large, by how much differs between machines too: it was 1.30 x on one of them.
    assert rows["evidence_temperature"]["nll"]["mean"] < plain["nll"]["mean"]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2, None], ids=["0", "1", "2", "without a bound"])
def test_temperatures_of_drawn_experts_do_not_collapse_in_500_steps(folder, monkeypatch, seed):
    """With the divergence as the penalty; with the papers' `-log T`, which has no bound, they do, and it is said."""
    if seed is None:
        monkeypatch.setattr(TemperatureChoice, "penalty", lambda _self, _logits, temperature: -temperature.log())
    settings = Settings(methods=METHODS, quiet=True, output_dir=str(folder), first_seed=SEED, accelerator="cpu")
    results = []

    def train(trainer, module, _prior_mean):
        def class_logits(model, batch):
            return model.class_logits(batch)

        def run():
            with torch.no_grad():
                return class_logits(module.eval(), batch)[0]

        training = TrainerTrainingData(trainer)
        batches = list(training.batches(None, "Routers"))
        batch = batches[0]
        routers = probe_routers(module, find_routers(module), run)
        way = choice_ways(module, routers, run)
        nets = [TemperatureChoice(router, returns_choice=way, seed=seed or 0) for router in routers]
        passes = RouterPasses(module, class_logits, training, None, seed=seed or 0, distributed=False)
        options = replace(TemperatureRouter().training_options, epochs=math.ceil(500 / len(batches)))
        with collected_fit_warnings() as said:
            results.append((passes.train_fully(0, nets, options).statistics, list(said), routers))

    with completed_run(settings.resolved(), announce=False) as (stored,):
        stored.with_trained(train)
    ((statistics, said, routers),) = results
    collapsed = [sentence for sentence in said if "has collapsed" in sentence]
    if seed is None:
        assert collapsed
        return
    assert not collapsed
    assert all(0.1 < temperature < 10 for temperature in statistics["gate_temperature"])
    shares = [e / math.log(r.num_experts) for e, r in zip(statistics["gate_entropy"], routers, strict=True)]
    assert all(0.05 < share < 0.95 for share in shares), shares
