"""Runs that are killed in their curvature pass, and the processes that resume it."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader
from toy import LAPLACE, ToyData, ToyModule, calibration_loader, fit_posterior, loader, train_loader, trainer

from bmoe_lightning.callback import BayesianMoECallback
from bmoe_lightning.curvature import Curvature
from bmoe_lightning.methods.storage import load_fit


class SaveWeights(L.Callback):
    def __init__(self, path):
        self.path = path

    def on_train_end(self, trainer, pl_module):
        torch.save(pl_module.state_dict(), self.path)


class Mortal(ToyModule):
    """Is killed in a forward pass after training; counts those it survived, after the checks of first batches."""

    def __init__(self, lives=None):
        super().__init__()
        self.lives = lives
        self.passes = -3

    def class_logits(self, batch):
        if not self.training:
            if self.passes == self.lives:
                raise RuntimeError("killed")
            self.passes += 1
        return super().class_logits(batch)

    def validation_step(self, batch, batch_idx):
        return None


CHECKPOINTED = {"methods": LAPLACE, "curvature_checkpoint_every": 4, "curvature": Curvature(fisher="mc")}


def accumulators(folder):
    return [path.name for path in folder.glob("curvature_state*")]


class TestKilledInTheCurvatureEpoch:
    """Ten batches, written every four."""

    def run(self, folder, module, data=None, **options):
        callback = BayesianMoECallback(**{**CHECKPOINTED, **options}, dirpath=str(folder / "bayesian"))
        callbacks = [SaveWeights(folder / "weights.pt"), callback]
        L.seed_everything(0, verbose=False)
        trainer(folder, callbacks, max_epochs=1, num_sanity_val_steps=0).fit(
            module, data or train_loader(), calibration_loader()
        )
        return callback

    def killed(self, folder, lives, data=None):
        folder.mkdir(exist_ok=True)
        with pytest.raises(RuntimeError, match="killed"):
            self.run(folder, Mortal(lives), data)
        torch.manual_seed(77)  # the state that a killed process leaves is nobody's
        return folder / "bayesian"

    def go_on(self, folder, data, **options):
        pretrained = ToyModule()
        module = Mortal()
        module.load_state_dict(torch.load(folder / "weights.pt"))
        callback = BayesianMoECallback(**{**CHECKPOINTED, **options}, dirpath=str(folder / "bayesian"))
        prior_mean = {n: p.detach() for n, p in pretrained.named_parameters() if "experts.down_proj" in n}
        fit_posterior(callback, trainer(folder, [callback]), module, data, prior_mean=prior_mean)
        return module.passes

    @pytest.mark.parametrize(("lives", "kept"), [(2, 0), (9, 4), (12, 8), (14, 10)])
    def test_fit_posterior_goes_on_to_the_same_bits(self, tmp_path, lives, kept):
        whole = tmp_path / "whole"
        whole.mkdir()
        self.run(whole, Mortal(), curvature_checkpoint_every=None)
        folder = self.killed(tmp_path / "killed", lives)
        assert len(accumulators(folder)) == bool(kept)
        # Each of the first four batches runs once more, for the gradients of the trained weights.
        assert self.go_on(tmp_path / "killed", train_loader()) == 10 + 4 + 7 - kept - min(kept, 4)
        (expected, _), (found, _) = load_fit(whole / "bayesian"), load_fit(folder)
        assert found.fingerprint == expected.fingerprint
        for name in LAPLACE[1:]:
            precisions = [fit.methods[name].state["prior_precision"] for fit in (found, expected)]
            assert torch.equal(*precisions)
        for one, other in zip(found.posteriors.values(), expected.posteriors.values(), strict=True):
            for layer, same in zip(one.factors.layers, other.factors.layers, strict=True):
                assert all(torch.equal(value, same.tensors()[name]) for name, value in layer.tensors().items())
        assert accumulators(folder) == []

    @pytest.mark.parametrize("has_generator", [False, True])
    def test_a_loader_with_a_generator_of_its_own(self, tmp_path, has_generator):
        generator = torch.Generator().manual_seed(3) if has_generator else None
        data = DataLoader(ToyData(160, 1), batch_size=16, shuffle=True, generator=generator)
        self.killed(tmp_path, 12, data)
        assert self.go_on(tmp_path, data) == 9

    def test_another_order_is_refused(self, tmp_path):
        folder = self.killed(tmp_path, 9)
        with pytest.raises(ValueError, match=r"curvature_state"):
            self.go_on(tmp_path, loader(160, 1))
        assert len(accumulators(folder)) == 1

    def test_a_fast_dev_run_leaves_them_alone(self, tmp_path):
        folder = self.killed(tmp_path, 9)
        (name,) = accumulators(folder)
        before = (folder / name).read_bytes()
        callback = BayesianMoECallback(**{**CHECKPOINTED, "curvature_checkpoint_every": 1}, dirpath=str(folder))
        trainer(tmp_path, [callback], fast_dev_run=True).fit(ToyModule(), train_loader(), calibration_loader())
        assert sorted(p.name for p in folder.iterdir()) == [".training", name]
        assert (folder / name).read_bytes() == before
