"""A mixture over runs in the callback: other runs' weights and fits are given, and checked before training."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from toy import ToyModule, calibration_loader, test_loader, train_loader, trainer

from bmoe_lightning.callback import BayesianMoECallback
from bmoe_lightning.curvature import Curvature
from bmoe_lightning.laplace.posterior import WeightMismatchError
from bmoe_lightning.methods import LaplaceEvidence, LaplaceMixture, save_snapshot

OPTIONS = {"curvature": Curvature(rank=3), "num_samples": 200}
POSTERIOR = LaplaceEvidence(**OPTIONS)


def probabilities(callback, name):
    return callback.predictions["test"][name].log_probs.exp()


def trained(folder, seed, *methods):
    """A run, its callback after a test, and its module."""
    torch.manual_seed(0)  # all runs start from the same weights
    module = ToyModule()
    L.seed_everything(seed, verbose=False)
    callback = BayesianMoECallback(methods, dirpath=str(folder / f"fit-{seed}"))
    run = trainer(folder, [callback])
    run.fit(module, train_loader(), calibration_loader())
    run.test(module, test_loader(), verbose=False)
    return callback, module


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    folder, found, options = tmp_path_factory.mktemp("runs"), [], {"runs": [], "fits": []}
    for seed in (1, 2):
        callback, module = trained(folder, seed, POSTERIOR)
        found.append(probabilities(callback, POSTERIOR.name))
        options["runs"].append(str(folder / f"{seed}.safetensors"))
        options["fits"].append(str(folder / f"fit-{seed}"))
        save_snapshot(options["runs"][-1], dict(module.named_parameters()))
    return options, found


def test_the_runs_of_a_user_are_averaged(others, tmp_path):
    options, found = others
    mixture = LaplaceMixture(component="laplace_evidence", **OPTIONS, **options)
    callback, module = trained(tmp_path, 3, POSTERIOR, mixture)
    expected = torch.stack([probabilities(callback, POSTERIOR.name), *found]).mean(0)
    torch.testing.assert_close(probabilities(callback, mixture.name), expected, rtol=1e-5, atol=1e-7)
    assert not torch.allclose(found[0], found[1], atol=1e-3)
    callback.fitted.check_weights(module)


def test_a_foreign_fit_is_refused_before_training_and_before_a_test(others, tmp_path):
    options, _ = others
    swapped = {"runs": options["runs"], "fits": options["fits"][::-1]}
    for given, error in ((swapped, WeightMismatchError), ({**options, "fits": ["a", "b"]}, FileNotFoundError)):
        mixture = LaplaceMixture(component="laplace_evidence", **OPTIONS, **given)
        callback = BayesianMoECallback([mixture], dirpath=str(tmp_path / "fit"))
        module = ToyModule()
        run = trainer(tmp_path, [callback])
        with pytest.raises(error, match="fits="):
            run.fit(module, train_loader(), calibration_loader())
        assert run.global_step == 0
