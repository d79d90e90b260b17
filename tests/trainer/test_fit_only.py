"""A trainer that is set up for training and runs something else: what is set up, and that all is as before."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from toy import ToyModule, calibration_loader, loader, trainer

from bmoe_lightning.trainer.fit_only import fit_only


class Hooks(L.Callback):
    def __init__(self):
        self.seen = []

    def setup(self, trainer, pl_module, stage):
        self.seen.append("setup fit" if stage == "fit" else "setup")

    def on_fit_start(self, trainer, pl_module):
        self.seen.append("fit start")

    def on_train_start(self, trainer, pl_module):
        self.seen.append("train start")

    def on_sanity_check_start(self, trainer, pl_module):
        self.seen.append("sanity check")

    def on_exception(self, trainer, pl_module, exception):
        self.seen.append("exception")

    def teardown(self, trainer, pl_module, stage):
        self.seen.append("teardown")


@pytest.fixture
def callback():
    return Hooks()


def data():
    return {"train_dataloaders": loader(32, 1), "val_dataloaders": calibration_loader()}


def test_the_action_runs_instead_of_training(tmp_path, callback):
    run, module = trainer(tmp_path, [callback], num_sanity_val_steps=2), ToyModule()
    before = [p.detach().clone() for p in module.parameters()]
    seen = []

    def action(given, given_module):
        callback.seen.append("action")
        seen.append((given is run, given_module is module, given.num_training_batches, len(given.optimizers)))

    fit_only(run, callback, module, action, **data())
    assert callback.seen == ["setup fit", "fit start", "action", "teardown"]
    assert seen == [(True, True, 2, 1)]
    assert run.global_step == 0
    assert run.num_sanity_val_steps == 2
    assert all(torch.equal(p, q) for p, q in zip(before, module.parameters(), strict=True))
    run.fit(module, **data())  # trains as ever
    assert run.global_step == 2 * 3
    assert "sanity check" in callback.seen
    assert "train start" in callback.seen


def test_a_missing_callback_is_there_meanwhile(tmp_path, callback):
    other = Hooks()
    run = trainer(tmp_path, [other])
    fit_only(run, callback, ToyModule(), lambda *_: callback.seen.append("action"), **data())
    assert callback.seen == ["setup fit", "fit start", "action", "teardown"]
    assert callback not in run.callbacks
    assert other in run.callbacks


@pytest.mark.parametrize("added", [True, False])
def test_all_is_as_before_after_an_exception(tmp_path, callback, added):
    run, module = trainer(tmp_path, [] if added else [callback], num_sanity_val_steps=2), ToyModule()
    callbacks = list(run.callbacks)

    def action(*_):
        raise KeyError("stop")

    with pytest.raises(KeyError, match="stop"):
        fit_only(run, callback, module, action, **data())
    assert callback.seen[-1] == "exception"
    assert run.callbacks == callbacks
    assert run.num_sanity_val_steps == 2
    run.fit(module, **data())
    assert run.global_step == 2 * 3


def test_the_module_is_by_default_that_of_the_trainer(tmp_path, callback):
    run, module, seen = trainer(tmp_path, [callback]), ToyModule(), []
    with pytest.raises(ValueError, match="the trainer has no module yet; pass module="):
        fit_only(run, callback, None, lambda *_: None, **data())
    assert callback.seen == []
    run.fit(module, **data())
    fit_only(run, callback, None, lambda _, given: seen.append(given), **data())
    assert seen == [module]


def test_a_checkpoint_is_loaded_before_the_action(tmp_path, callback):
    trained = ToyModule(seed=4)
    run = trainer(tmp_path, [])
    run.fit(trained, **data())
    run.save_checkpoint(tmp_path / "trained.ckpt")
    module, found = ToyModule(), []
    fit_only(
        trainer(tmp_path, [callback]),
        callback,
        module,
        lambda _, given: found.extend(p.detach().clone() for p in given.parameters()),
        ckpt_path=str(tmp_path / "trained.ckpt"),
        **data(),
    )
    assert all(torch.equal(p, q) for p, q in zip(found, trained.parameters(), strict=True))
