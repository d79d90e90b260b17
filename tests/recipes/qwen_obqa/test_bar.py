"""What is promised of the built-in task: the posterior calibrates, and drawn experts keep a temperature."""

from __future__ import annotations

import json
import math
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from bmoe_lightning.experts.counted_batch import plain_batch
from bmoe_lightning.laplace.predictive import class_probabilities
from bmoe_lightning.methods import BatchView, TemperatureRouter
from bmoe_lightning.methods.evaluation import average_log_probs
from bmoe_lightning.methods.router_training import RouterPasses
from bmoe_lightning.methods.storage import load_fit
from bmoe_lightning.routers import (
    FixedNoise,
    PositionNoise,
    TemperatureChoice,
    choice_ways,
    find_routers,
    probe_routers,
    sampled_routes,
)
from bmoe_lightning.trainer.data_passes import TrainerTrainingData, validation_pass
from bmoe_lightning.utils.fit_warnings import collected_fit_warnings
from recipes.qwen_obqa.__main__ import main
from recipes.qwen_obqa.experiment import completed_run
from recipes.qwen_obqa.settings import Settings

METHODS = (
    "map", "mc_dropout", "temperature", "laplace_lpo", "evidence_temperature", "router_noise", "laplace_router_noise",
)  # fmt: skip
ROUTES = ("router_noise.num_samples=8", "laplace_router_noise.num_samples=8")
# Neither among the seeds that the README reports nor among those on which the settings were chosen.
SEED = 200


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bar") / "run"
    arguments = ["--quiet", "--output-dir", str(folder), "--first-seed", str(SEED), "--accelerator", "cpu"]
    assert main([*arguments, "--methods", ",".join(METHODS), *(f"--set={text}" for text in ROUTES)]) == 0
    return folder


@contextmanager
def stored(folder):
    settings = Settings(
        methods=METHODS, set=ROUTES, quiet=True, output_dir=str(folder), first_seed=SEED, accelerator="cpu"
    )
    with completed_run(settings.resolved(), announce=False) as (run,):
        yield run


def class_logits(model, batch):
    return model.class_logits(batch)


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
    results = []

    def train(trainer, module, _prior_mean):
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

    with stored(folder) as run_of_seed:
        run_of_seed.with_trained(train)
    ((statistics, said, routers),) = results
    collapsed = [sentence for sentence in said if "has collapsed" in sentence]
    if seed is None:
        assert collapsed
        return
    assert not collapsed
    assert all(0.1 < temperature < 10 for temperature in statistics["gate_temperature"])
    shares = [e / math.log(r.num_experts) for e, r in zip(statistics["gate_entropy"], routers, strict=True)]
    assert all(0.05 < share < 0.95 for share in shares), shares


@pytest.mark.slow
def test_the_gaussian_of_posterior_and_routes_is_near_the_mixture(folder):
    """On the held-out labels that it was fitted to: not above either alone, and within .03 nats of the mixture."""
    losses = {}

    def compare(trainer, module, _prior_mean):
        fitted = load_fit(run_of_seed.fit_folder)[0]
        methods = {method.name: method for method in run_of_seed.methods}
        both = methods["laplace_router_noise"]
        state = fitted.state_of(both)
        precision, noise = state["joint_precision"], PositionNoise(fitted.seed, antithetic=both.antithetic)
        nets = list(map(FixedNoise, find_routers(module), state["sigma"].tolist()))
        posteriors = fitted.posteriors_for(both.curvatures, module)
        assert state["sigma"].any()
        module.eval()

        def nll(name, log_probs, labels):
            losses.setdefault(name, []).append(-log_probs.gather(1, labels.unsqueeze(1)).squeeze(1))

        for batch in validation_pass(trainer, "Calibration"):
            batch = plain_batch(batch)
            view = BatchView(module, class_logits, batch, posteriors, seed=fitted.seed)
            for name in ("laplace_lpo", "router_noise", "laplace_router_noise"):
                nll(name, methods[name].log_probs(view, fitted.state_of(methods[name])), view.labels)
            gaussian = state | {"mixture": torch.tensor(0), "posterior_share": torch.tensor(1.0, dtype=torch.float64)}
            nll("gaussian", both.log_probs(view, gaussian), view.labels)
            routes = []
            for index in range(both.num_samples):
                with sampled_routes(module, nets, [index], noise):
                    along = BatchView(module, class_logits, batch, posteriors, seed=fitted.seed)
                    moments = along.covariance(both.spec, precision)
                routes.append(class_probabilities(*moments, both.link, num_samples=both.link_samples, seed=fitted.seed))
            nll("mixture", average_log_probs(torch.stack(routes)), view.labels)

    with stored(folder) as run_of_seed:
        run_of_seed.with_trained(compare)
    found = {name: float(torch.cat(parts).mean()) for name, parts in losses.items()}
    assert found["laplace_router_noise"] <= min(found["laplace_lpo"], found["router_noise"]) + 1e-3, found
    assert abs(found["gaussian"] - found["mixture"]) < 0.03, found
