"""Steps that take the logits of the callback's prediction of the same batch: one forward pass a batch."""

from __future__ import annotations

from contextlib import contextmanager

import lightning as L
import pytest
import torch
from finetuner_cases import finetuner, trainer
from torch.utils.data import DataLoader

from bmoe_lightning import BayesianMoECallback, ExpertFinetuner
from bmoe_lightning.trainer.shared_logits import SharedLogits

SIZE = 4


def loader(num_batches, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, 90, (SIZE * num_batches, 5), generator=generator)
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row), "label": row[0] % 3} for row in ids]
    return DataLoader(rows, batch_size=SIZE)


@contextmanager
def counted(module):
    """Counts the forward passes of the language model."""
    calls = []
    hook = module.model.register_forward_hook(lambda *_: calls.append(1))
    yield calls
    hook.remove()


def fitted(folder, *callbacks, module=None):
    module = finetuner(answer_token_ids=[1, 2, 3], expert_dropout=0.0) if module is None else module
    run = trainer(folder, *callbacks, num_sanity_val_steps=0, limit_train_batches=2)
    run.fit(module, loader(2), loader(2, 1))
    return module, run


def passes_per_batch(module, evaluate):
    """Forward passes for each batch, apart from the checks of the first."""
    found = []
    for num_batches in (2, 5):
        with counted(module) as calls:
            logged = evaluate(module, loader(num_batches, 2), verbose=False)[0]
        found.append(len(calls))
    assert (found[1] - found[0]) % 3 == 0
    return (found[1] - found[0]) / 3, logged


@pytest.mark.parametrize("methods", [("map",), ("map", "laplace_evidence")])
def test_an_epoch_takes_one_forward_pass_for_each_batch(methods, tmp_path):
    module, run = fitted(tmp_path, BayesianMoECallback(methods, dirpath=str(tmp_path / "fit")))
    alone = trainer(tmp_path)
    for stage in ("test", "validate"):
        passes, logged = passes_per_batch(module, getattr(run, stage))
        assert passes == 1
        expected = getattr(alone, stage)(module, loader(5, 2), verbose=False)[0]
        assert set(expected) < set(logged)
        assert {name: logged[name] for name in expected} == pytest.approx(expected, rel=1e-5)
        name = "val" if stage == "validate" else stage
        assert logged[f"{name}/acc"] == pytest.approx(logged[f"map/{name}/acc"])


def test_loaders_are_logged_separately(tmp_path):
    module, run = fitted(tmp_path, BayesianMoECallback(("map",), dirpath=str(tmp_path / "fit")))
    data = [loader(2, 2), loader(3, 4)]
    found = run.test(module, data, verbose=False)
    expected = trainer(tmp_path).test(module, data, verbose=False)
    for one, other in zip(found, expected, strict=True):
        assert {name: one[name] for name in other} == pytest.approx(other, rel=1e-5)


def test_two_callbacks_share_with_one_step(tmp_path):
    callbacks = [BayesianMoECallback(("map",), name=name, dirpath=str(tmp_path / name)) for name in ("one", "two")]
    module, run = fitted(tmp_path, *callbacks)
    passes, logged = passes_per_batch(module, run.test)
    assert passes == 2
    expected = trainer(tmp_path).test(module, loader(5, 2), verbose=False)[0]
    assert {name: logged[name] for name in expected} == pytest.approx(expected, rel=1e-5)


class OtherBatch(ExpertFinetuner):
    """Evaluates other inputs than it is given."""

    def test_step(self, batch, batch_idx):
        super().test_step({**batch, "input_ids": batch["input_ids"].flip(1)}, batch_idx)


class ChangedBatch(ExpertFinetuner):
    """Evaluates other inputs, in the batch that it is given."""

    def test_step(self, batch, batch_idx):
        ids = batch["input_ids"]
        batch["input_ids"] = ids.flip(1)
        super().test_step(batch, batch_idx)
        batch["input_ids"] = ids


class OtherWeights(ExpertFinetuner):
    """Evaluates other weights, as those averaged over training."""

    def test_step(self, batch, batch_idx):
        weight = self.model.lm_head.weight
        before = weight.detach().clone()
        with torch.no_grad():
            weight.mul_(2)
        super().test_step(batch, batch_idx)
        with torch.no_grad():
            weight.copy_(before)


class OwnStep(ExpertFinetuner):
    def test_step(self, batch, batch_idx):
        logits, labels = self.class_logits(batch)
        self.log("mine", (logits.argmax(-1) == labels).float().mean(), batch_size=len(labels))


@pytest.mark.parametrize("kind", [OtherBatch, ChangedBatch, OtherWeights, OwnStep])
def test_a_step_that_computes_its_own_logits_logs_them(kind, tmp_path):
    model = finetuner().model
    module = kind(model, answer_token_ids=[1, 2, 3], learning_rate=0.01)
    _, run = fitted(tmp_path, BayesianMoECallback(("map",), dirpath=str(tmp_path / "fit")), module=module)
    passes, logged = passes_per_batch(module, run.test)
    assert passes == 2
    expected = trainer(tmp_path).test(module, loader(5, 2), verbose=False)[0]
    assert {name: logged[name] for name in expected} == pytest.approx(expected, rel=1e-5)
    assert ("test/loss" in logged) == (kind is not OwnStep)


def test_logits_of_another_function_are_not_shared(tmp_path):
    def others(module, batch):
        logits, labels = module.class_logits(batch)
        return logits.flip(1), labels

    callback = BayesianMoECallback(("map",), class_logits=others, dirpath=str(tmp_path / "fit"))
    module, run = fitted(tmp_path, callback)
    passes, logged = passes_per_batch(module, run.test)
    assert passes == 2
    assert logged["test/loss"] != pytest.approx(logged["map/test/nll"])


def test_nothing_stays_announced_after_an_exception(tmp_path):
    class Stops(L.Callback):
        def on_test_batch_end(self, *_):
            raise RuntimeError("stopped after the step")

    module, run = fitted(tmp_path, Stops(), BayesianMoECallback(("map",), dirpath=str(tmp_path / "fit")))
    with pytest.raises(RuntimeError, match="stopped after the step"):
        run.test(module, loader(2, 2), verbose=False)
    assert vars(module.shared_logits) == vars(SharedLogits())


def test_logits_are_given_once_to_those_who_asked_for_this_batch():
    shared, batch, used = SharedLogits(), {"ids": 1}, []
    logits, labels = torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)
    assert not shared.ask(batch, lambda *given: used.append(given))
    shared.announce(batch)
    assert not shared.ask(dict(batch), lambda *given: used.append(given))
    assert shared.ask(batch, lambda *given: used.append(given))
    shared.give(logits, labels)
    shared.give(logits, labels)
    assert used == [(logits, labels)]
    assert not shared.ask(batch, lambda *given: used.append(given))
