"""What another process, another fit or another run finds of what the callback wrote."""

from __future__ import annotations

import json
import pickle

import pytest
import torch
from toy import LAPLACE, ToyModule, calibration_loader, fit_posterior, test_loader, train_loader, trainer

from bmoe_lightning.callback import BayesianMoECallback
from bmoe_lightning.methods import LaplaceLPO, NotFittedError


class TestProcesses:
    def test_a_fitted_callback_can_be_pickled(self, trained):
        """Strategies that spawn processes pickle it, and they predict with it."""
        copied = pickle.loads(pickle.dumps(trained.callback))
        expected = trained.run.test(trained.module, test_loader(), verbose=False)
        assert trainer(trained.folder, [copied]).test(trained.module, test_loader(), verbose=False) == expected
        assert {"laplace_evidence", "laplace_lpo"} <= set(copied.fitted.methods)

    def test_a_new_process_finds_the_posterior_by_its_folder(self, trained):
        callback = BayesianMoECallback(methods=LAPLACE, dirpath=str(trained.folder / "bayesian"))
        module = ToyModule()
        module.load_state_dict(trained.module.state_dict())
        metrics = trainer(trained.folder, [callback]).test(module, test_loader(), verbose=False)[0]
        for method in LAPLACE:
            assert metrics[f"{method}/test/nll"] == pytest.approx(trained.metrics[f"{method}/test/nll"], rel=1e-5)

    def test_a_new_process_finds_the_posterior_through_a_checkpoint(self, trained, tmp_path):
        path = tmp_path / "after.ckpt"
        trained.run.save_checkpoint(path)
        callback = BayesianMoECallback(methods=trained.callback.methods)
        metrics = trainer(tmp_path, [callback]).test(
            ToyModule(seed=9), test_loader(), ckpt_path=str(path), weights_only=True, verbose=False
        )[0]
        assert metrics["laplace_lpo/test/nll"] == pytest.approx(trained.metrics["laplace_lpo/test/nll"], rel=1e-5)

    def test_testing_before_fitting_says_what_to_do(self, tmp_path):
        run = trainer(tmp_path, [BayesianMoECallback()])
        with pytest.raises(RuntimeError, match="fit_posterior"):
            run.test(ToyModule(), test_loader(), verbose=False)

    def test_fit_posterior_on_a_trained_model(self, trained, tmp_path):
        module = ToyModule()
        module.load_state_dict(trained.module.state_dict())
        callback = BayesianMoECallback(methods=("map", "laplace_lpo"))
        run = trainer(tmp_path, [callback])
        fit_posterior(callback, run, module)
        metrics = run.test(module, test_loader(), verbose=False)[0]
        assert metrics["laplace_lpo/test/nll"] == pytest.approx(trained.metrics["laplace_lpo/test/nll"], rel=1e-3)

    def test_a_training_without_steps_says_that_nothing_was_fitted(self, tmp_path):
        with pytest.warns(UserWarning, match="training ended without a fit.*fit_posterior"):
            trainer(tmp_path, [BayesianMoECallback()], limit_train_batches=0).fit(
                ToyModule(), train_loader(), calibration_loader()
            )

    def test_state_is_small_and_loads_without_pickle(self, trained, tmp_path):
        path = tmp_path / "state.ckpt"
        trained.run.save_checkpoint(path)
        state = torch.load(path, weights_only=True)["callbacks"][trained.callback.state_key]
        samples = state.pop("prior_mean")  # from before training: 64 values of each of 4 experts, however large
        assert len(json.dumps(state)) < 1000
        assert len(samples) == 2
        assert all(len(json.dumps(found)) < 1500 for found in samples.values())

    def test_a_fit_with_other_settings_is_refused(self, trained):
        callback = BayesianMoECallback(("map", LaplaceLPO(scope="global")), dirpath=str(trained.folder / "bayesian"))
        with pytest.raises(NotFittedError, match=r"other options: scope='layer' \(here 'global'\).*fit_posterior"):
            trainer(trained.folder, [callback]).test(trained.module, test_loader(), verbose=False)

    def test_fewer_methods_can_be_tested_than_were_fitted(self, trained, tmp_path):
        path = tmp_path / "after.ckpt"
        trained.run.save_checkpoint(path)
        callback = BayesianMoECallback(methods=("map", "laplace_lpo"))
        metrics = trainer(tmp_path, [callback]).test(
            ToyModule(seed=9), test_loader(), ckpt_path=str(path), weights_only=True, verbose=False
        )[0]
        assert "laplace_lpo/test/nll" in metrics

    def test_fit_posterior_writes_where_it_was_told_to(self, trained, tmp_path):
        callback = BayesianMoECallback(dirpath=str(tmp_path / "b"))
        fit_posterior(callback, trainer(tmp_path, [callback]), trained.module)
        again = BayesianMoECallback(dirpath=str(tmp_path / "b"))
        metrics = trainer(tmp_path, [again]).test(trained.module, test_loader(), verbose=False)[0]
        assert "laplace_lpo/test/nll" in metrics

    def test_entropy_belongs_to_the_probabilities_under_any_link(self, trained):
        callback = BayesianMoECallback(
            ("map", LaplaceLPO(link="probit")),
            predict_method="laplace_lpo",
            dirpath=str(trained.folder / "bayesian"),
        )
        first = trainer(trained.folder, [callback]).predict(trained.module, test_loader())[0]
        torch.testing.assert_close(first["entropy"], -(first["probs"] * first["log_probs"]).sum(1))
