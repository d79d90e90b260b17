"""What is wrong with `class_logits` is told before the first training step, and checking it changes nothing."""

from __future__ import annotations

import copy
import random
import warnings

import lightning as L
import numpy as np
import pytest
import torch
from fake_trainer import FakeTrainer
from forked_processes import run as run_processes
from torch.nn.functional import dropout
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, IterableDataset
from toy import ToyData, ToyModule, calibration_loader, loader, test_loader, trainer

from bmoe_lightning.callback import BayesianMoECallback
from bmoe_lightning.curvature import Curvature
from bmoe_lightning.methods import LaplaceEvidence, LeaveOneOutTemperature, get_method
from bmoe_lightning.trainer import first_batches
from bmoe_lightning.trainer.first_batches import FirstBatches, no_logging
from bmoe_lightning.utils.distributed import OtherRankError, gather_number


class Wrong(ToyModule):
    """Spoils what `class_logits` returns; its own steps do not notice."""

    def __init__(self, spoil=lambda module, logits, labels, batch: (logits, labels)):
        super().__init__()
        self.spoil = spoil
        self.hidden = [copy.deepcopy(self.network)]  # no submodule
        self.steps = 0

    def class_logits(self, batch):
        logits, labels = ToyModule.class_logits(self, batch)
        return self.spoil(self, logits, labels, batch)

    def training_step(self, batch, batch_idx):
        self.steps += 1
        return torch.nn.functional.cross_entropy(*ToyModule.class_logits(self, batch))

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        return None

    test_step = validation_step


def reentrant(module, logits, labels, batch):
    embedded = module.network.get_input_embeddings()(batch["input_ids"])
    run = lambda x: module.network(inputs_embeds=x, use_cache=False).logits[:, -1, [1, 2, 3]]  # noqa: E731
    return checkpoint(run, embedded, use_reentrant=True), labels


def without_gradients(module, logits, labels, batch):
    with torch.no_grad():
        return ToyModule.class_logits(module, batch)


def a_copy(module, logits, labels, batch):
    return module.hidden[0](input_ids=batch["input_ids"], use_cache=False).logits[:, -1, [1, 2, 3]], labels


def writes(module, logits, labels, batch):
    batch["input_ids"].clamp_(max=20)
    return logits, labels


CASES = {
    "float labels": (lambda m, f, y, b: (f, y.float()), "labels as torch.float32"),
    "bool labels": (lambda m, f, y, b: (f, y > 0), "labels as torch.bool"),
    "a list of labels": (lambda m, f, y, b: (f, y.tolist()), "labels as a list"),
    "one-hot labels": (lambda m, f, y, b: (f, torch.nn.functional.one_hot(y, 3)), "look one-hot"),
    "ignored labels": (lambda m, f, y, b: (f, y.clone().fill_(-100)), "labels -100 for K = 3"),
    "labels from 1": (lambda m, f, y, b: (f, y + 1), "counted from 1"),
    "no labels": (lambda m, f, y, b: (f, None), "laplace_lpo need labels"),
    "labels of a part": (lambda m, f, y, b: (f, y[1:]), r"logits \(16, 3\) and labels \(15,\)"),
    "two rows an example": (lambda m, f, y, b: (f.repeat(2, 1), y), r"logits \(32, 3\) and labels \(16,\)"),
    "detached": (lambda m, f, y, b: (f.detach(), y), "logits without a graph"),
    "no gradients": (without_gradients, "ran without gradients"),
    "inference mode": (lambda m, f, y, b: (torch.inference_mode()(lambda: f * 1)(), y), "logits without a graph"),
    "reentrant checkpointing": (reentrant, "reentrant gradient checkpointing"),
    "probabilities": (lambda m, f, y, b: (f.softmax(-1), y), "returned probabilities"),
    "one logit": (lambda m, f, y, b: (f[:, :1], y), r"shape \[B, K\] with K >= 2"),
    "a vector": (lambda m, f, y, b: (f[:, 0], y), r"shape \[B, K\] with K >= 2"),
    "integers": (lambda m, f, y, b: (f.long(), y), r"shape \[B, K\] with K >= 2"),
    "NaN": (lambda m, f, y, b: (f * torch.nan, y), "NaN or"),
    "a tensor": (lambda m, f, y, b: f, r"must return \(logits, labels or None\)"),
    "logs": (lambda m, f, y, b: (m.log("acc", 1.0), (f, y))[1], r"class_logits calls self\.log"),
    "logs a dict": (lambda m, f, y, b: (m.log_dict({"acc": 1.0}), (f, y))[1], r"class_logits calls self\.log"),
    "writes to the batch": (writes, r"class_logits writes in place to batch\['input_ids'\]"),
    "centred over the batch": (lambda m, f, y, b: (f - f.mean(0), y), "moves the logits of several examples"),
    "normalised over the batch": (lambda m, f, y, b: (f / f.std(), y), "moves the logits of several examples"),
    "less a mean without a graph": (
        lambda m, f, y, b: (f - f.mean(0).detach(), y),
        "on the other examples of a batch",
    ),
    "dropout in every mode": (lambda m, f, y, b: (dropout(f, 0.3), y), r"called again.*training=self\.training"),
    "noise": (lambda m, f, y, b: (f + 0.1 * torch.randn_like(f), y), "called again with the same batch"),
    "training mode": (lambda m, f, y, b: (m.network.train() and f, y), "leaves network in training mode"),
    "a copy of the model": (a_copy, "no token was routed"),
}
DEEP = (
    "detached",
    "no gradients",
    "inference mode",
    "reentrant checkpointing",
    "a copy of the model",
    "centred over the batch",
    "normalised over the batch",
    "less a mean without a graph",
    "dropout in every mode",
    "noise",
)


@pytest.mark.parametrize("name", CASES)
def test_before_the_first_step(tmp_path, name):
    spoil, message = CASES[name]
    module = Wrong(spoil)
    if name == "a copy of the model":
        module.class_logits = lambda batch: a_copy(module, None, batch["labels"], batch)
    run = trainer(tmp_path, [BayesianMoECallback()], max_epochs=1, num_sanity_val_steps=0)
    with pytest.raises((ValueError, RuntimeError, TypeError), match=message) as error:
        run.fit(module, loader(32, 1), calibration_loader())
    assert module.steps == 0
    stage = "training" if name in DEEP else "validation"
    assert f"first batch of the {stage} data" in error.value.__notes__[0]
    assert "log" not in vars(module)


def test_only_what_a_method_uses_has_to_be_there(tmp_path):
    """Without labels nothing but the calibration and the metrics needs, and without a validation split."""
    module = Wrong(lambda m, f, y, b: (f, None))
    callback = BayesianMoECallback(["map", LaplaceEvidence(prior_mean="zero")])
    run = trainer(tmp_path, [callback], max_epochs=1)
    run.fit(module, loader(32, 1))
    assert module.steps == 2
    with pytest.raises(ValueError, match="metrics need labels"):
        run.test(module, test_loader(), verbose=False)


def test_labels_of_the_empirical_fisher(tmp_path):
    module = Wrong(lambda m, f, y, b: (f, None))
    callback = BayesianMoECallback(
        [LaplaceEvidence(prior_mean="zero")], curvature=Curvature(fisher="empirical"), dirpath=str(tmp_path)
    )
    with pytest.raises(ValueError, match="the empirical Fisher of laplace_evidence need labels"):
        trainer(tmp_path, [callback], max_epochs=1).fit(module, loader(32, 1))
    assert module.steps == 0


def test_labels_of_methods_that_are_fitted_on_those_of_training_examples(tmp_path):
    module = Wrong(lambda m, f, y, b: (f, None))
    callback = BayesianMoECallback([LeaveOneOutTemperature(prior_mean="zero", min_inputs=1)], dirpath=str(tmp_path))
    with pytest.raises(ValueError, match="leave_one_out_temperature need labels"):
        trainer(tmp_path, [callback], max_epochs=1).fit(module, loader(32, 1), loader(16, 2))
    assert module.steps == 0


def test_a_fit_without_training_tells_it_before_the_curvature_pass(tmp_path):
    seen = []

    def spoil(module, logits, labels, batch):
        seen.append(len(logits))
        return logits, labels.float()

    with pytest.raises(ValueError, match=r"labels as torch\.float32"):
        BayesianMoECallback().fit_posterior(
            Wrong(spoil), trainer=trainer(tmp_path, []), train_dataloaders=loader(64, 1), val_dataloaders=loader(16, 2)
        )
    assert len(seen) == 1


def test_class_logits_that_is_no_function(tmp_path):
    with pytest.raises(TypeError, match="class_logits must be a function"):
        trainer(tmp_path, [BayesianMoECallback(class_logits=3)]).fit(ToyModule(), loader(16, 1), calibration_loader())


def test_a_mask_of_minus_one_hundred_is_said(tmp_path):
    spoil = lambda m, f, y, b: (torch.cat([f, torch.full_like(f[:, :1], -100)], 1), y)  # noqa: E731
    with pytest.warns(UserWarning, match="the same value -100 in several rows.*use -inf"):
        trainer(tmp_path, [BayesianMoECallback(["map"])], max_epochs=1).fit(Wrong(spoil), loader(16, 1))


def test_experts_that_no_optimizer_trains(tmp_path):
    class Head(Wrong):
        def configure_optimizers(self):
            return torch.optim.SGD(self.network.lm_head.parameters(), lr=0.1)

    module = Head()
    with pytest.raises(ValueError, match="no optimizer has a parameter of "):
        trainer(tmp_path, [BayesianMoECallback(["laplace_evidence"])], max_epochs=1).fit(module, loader(32, 1))
    assert module.steps == 0


class Once(IterableDataset):
    def __init__(self, size):
        data = loader(size, 1).dataset
        self.rows = (data[i] for i in range(size))

    def __iter__(self):
        yield from self.rows


class TestDataThatCanBeIteratedOnce:
    def test_training_data(self, tmp_path):
        module = Wrong()
        stream = DataLoader(Once(48), 16)
        options = {"limit_train_batches": 3, "max_epochs": 1}
        with pytest.raises(ValueError, match=r"training data can be iterated over only once.*after training"):
            trainer(tmp_path, [BayesianMoECallback()], **options).fit(module, stream, calibration_loader())
        assert len(list(stream)) == 3
        trainer(tmp_path, [BayesianMoECallback(["map", "temperature"])], **options).fit(
            module, DataLoader(Once(48), 16), calibration_loader()
        )
        assert module.steps == 3

    def test_validation_data(self, tmp_path):
        options = {"limit_val_batches": 2, "num_sanity_val_steps": 0}
        with pytest.raises(ValueError, match="validation data can be iterated over only once"):
            trainer(tmp_path, [BayesianMoECallback()], **options).fit(Wrong(), loader(16, 1), DataLoader(Once(48), 16))

    def test_ensembles_need_another_pass_over_test_data(self, tmp_path):
        module = Wrong()
        callback = BayesianMoECallback(["map", "checkpoint_ensemble"])
        run = trainer(tmp_path, [callback], max_epochs=2)
        run.fit(module, loader(16, 1))
        with pytest.raises(ValueError, match="checkpoint_ensemble run one pass over the data per member"):
            run.test(module, DataLoader(Once(16), 16), verbose=False)
        callback.methods = callback.methods[:1]
        assert "map/test/nll" in run.test(module, DataLoader(Once(16), 16), verbose=False)[0]


class Noise(ToyModule):
    """Draws from all random states, in every mode, and keeps statistics."""

    def __init__(self):
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(3)
        self.drawn = []

    def class_logits(self, batch):
        logits, labels = super().class_logits(batch)
        draws = random.random() + np.random.rand() + float(torch.rand(()))
        return self.norm(logits) + 0.01 * draws, labels

    def training_step(self, batch, batch_idx):
        self.drawn.append(batch["input_ids"].clone())
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss)
        return loss


@pytest.mark.parametrize("sanity", [0, 2])
def test_training_is_what_it_is_without_the_check(tmp_path, sanity):
    found = []
    for callbacks in ([], [BayesianMoECallback()]):
        L.seed_everything(3, verbose=False)
        module = Noise()
        run = trainer(tmp_path, callbacks, max_epochs=1, num_sanity_val_steps=sanity)
        run.fit(module, loader(48, 1, shuffle=True), loader(32, 2, shuffle=True))
        logged = {name: float(value) for name, value in run.logged_metrics.items()}
        found.append(([*module.state_dict().values(), *module.drawn], logged, module.norm.num_batches_tracked))
    (one, logged, _), (other, logged_too, _) = found
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert logged == logged_too


def test_logging_is_refused_within_and_restored(trained):
    module = trained.module
    module.log_dict = marker = object()
    with no_logging(module), pytest.raises(RuntimeError, match=r"class_logits calls self\.log"):
        module.log("x", 1)
    assert module.log_dict is marker
    del module.log_dict
    assert "log" not in vars(module)


class LeftPadded(ToyData):
    """The toy's data with a mask that leaves out the first tokens of some rows."""

    def __getitem__(self, index):
        item = ToyData.__getitem__(self, index)
        mask = torch.ones_like(item["input_ids"])
        mask[: index % 3] = 0
        return {**item, "attention_mask": mask}


@pytest.mark.parametrize("mixes", [True, False])
def test_padding_that_changes_a_row_is_said_before_the_first_step(tmp_path, mixes):
    def spoil(module, logits, labels, batch):
        mask = batch["attention_mask"]
        if not mixes:
            # The logits of the last token alone, whatever stands before it.
            logits = module.network(input_ids=batch["input_ids"][:, -1:], use_cache=False).logits[:, -1, [1, 2, 3]]
        return logits * (1 + mixes * mask.eq(0).sum(1, keepdim=True)), labels

    module = Wrong(spoil)
    batches = DataLoader(LeftPadded(8, 1), batch_size=4)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        trainer(tmp_path, [BayesianMoECallback(("map",))], max_epochs=1).fit(module, batches)
    said = [str(warning.message) for warning in seen if "padding changes" in str(warning.message)]
    assert len(said) == mixes
    assert all("does not ignore padding on the left" in line for line in said)


class Rows(IterableDataset):
    def __init__(self, *rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


class NotDrawn:
    """Batches of which none can be drawn beforehand."""

    def __init__(self, *batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


def one_rank_without_validation_data(rank, world_size):
    """Every rank gets as far as `gather_number`, and in the same order."""
    first_batches.on_device = lambda trainer, batch, index: batch
    (batch,) = loader(4, 1)
    rows, wrong = ToyData(4, 1), {**batch, "labels": batch["labels"] + 7}
    wrong_rows = [{**rows[i], "labels": rows[i]["labels"] + 7} for i in range(4)]

    def checks(loader):
        checks = FirstBatches([get_method("temperature")], lambda module, batch: module.class_logits(batch))
        fake = FakeTrainer(world_size=world_size, enable_validation=True, val_dataloaders=loader)
        checks.check_fit(fake, ToyModule())
        return checks, fake

    def in_step():
        assert gather_number(rank) == list(range(world_size))

    for having in (0, 1):  # drawn beforehand
        for given, right in ((list(rows), True), (wrong_rows, False)):
            stream = DataLoader(Rows(*given) if rank == having else Rows(), 4)
            if right:
                found, fake = checks(stream)
                if rank == having:
                    found.check(fake, ToyModule(), batch, "validation")
                found.end_validation()
            else:
                with pytest.raises(ValueError if rank == having else OtherRankError, match="labels 7"):
                    checks(stream)
            in_step()
        for given in (batch, wrong):  # when the trainer draws it, which one rank does not
            found, fake = checks(NotDrawn())
            if rank == having:
                found.check(fake, ToyModule(), given, "validation")
            in_step()
            if given is wrong:
                with pytest.raises(ValueError if rank == having else OtherRankError, match="labels 7"):
                    found.end_validation()
            found.end_validation()
            in_step()


def test_a_rank_without_validation_data_keeps_nobody_waiting(tmp_path, monkeypatch):
    monkeypatch.setattr(first_batches, "validation_pass", lambda *_: None)
    run_processes(one_rank_without_validation_data, 2, tmp_path)


def test_routers_that_are_not_supported_are_told_before_training(tmp_path):
    """The logits of the first router get a second linear map."""

    class TwoMaps(torch.nn.Module):
        def __init__(self, gate):
            super().__init__()
            self.gate, self.weight = gate, gate.weight

        def forward(self, x):
            torch.nn.functional.linear(x.reshape(-1, x.shape[-1]), self.weight)
            return self.gate(x)

    def told(module):
        callback = BayesianMoECallback(["router_noise"], dirpath=str(tmp_path / "b"))
        run = trainer(tmp_path, [callback], num_sanity_val_steps=0, max_epochs=1)
        with pytest.raises(ValueError, match="made its logits by 2 calls") as raised:
            run.fit(module, loader(8, 1), calibration_loader())
        return raised.value

    module = Wrong()
    block = module.network.model.layers[0].mlp
    block.gate = TwoMaps(block.gate)
    assert "the first batch of the validation data" in told(module).__notes__[0]
    assert module.steps == 0
