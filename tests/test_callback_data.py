"""`fit_posterior` on a finished fit: the data of that fit, in any order, and no others."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Subset
from toy import ToyData, ToyModule, calibration_loader, loader, train_loader, trainer

from bmoe_lightning import BayesianMoECallback
from bmoe_lightning.curvature import Curvature
from bmoe_lightning.methods import EvidenceTemperature, LaplaceEvidence
from bmoe_lightning.methods.data_differences import DataMismatchError
from bmoe_lightning.methods.needs import NeedsError
from bmoe_lightning.methods.storage import load_fit

METHODS = ("map", "laplace_lpo")
ADDED = {
    "nothing": (),
    "without curvature": ("temperature",),
    "shared curvature": (LaplaceEvidence(prior_mean="zero"),),
    "new curvature": (LaplaceEvidence(prior_mean="zero", curvature=Curvature(rank=2)),),
}


def relabelled(size, seed, row):
    data = ToyData(size, seed)
    data.labels[row] = (data.labels[row] + 1) % 3
    return data


class Run:
    def __init__(self, folder):
        self.folder, self.module = folder, ToyModule()
        self.first = BayesianMoECallback(METHODS, dirpath=str(folder / "fit"))
        trainer(folder, [self.first], max_epochs=1).fit(self.module, train_loader(), calibration_loader())

    def complete(self, added, training=None, held_out=None, *, in_memory=False):
        callback = BayesianMoECallback([*METHODS, *added], dirpath=str(self.folder / "fit"))
        if in_memory:
            callback.fitted = self.first.fitted
        callback.fit_posterior(
            self.module,
            trainer=trainer(self.folder, [callback]),
            train_dataloaders=training or train_loader(),
            val_dataloaders=held_out or calibration_loader(),
        )
        return callback.fitted


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return Run(tmp_path_factory.mktemp("finished"))


OTHER_CALIBRATION = {
    "other labels": relabelled(112, 2, 100),
    "fewer rows": Subset(ToyData(112, 2), range(111)),
    "other rows": ToyData(112, 7),
}
OTHER_TRAINING = {
    "other labels": relabelled(160, 1, 3),
    "fewer rows": Subset(ToyData(160, 1), range(159)),
    "other rows": ToyData(160, 7),
}


@pytest.mark.parametrize(
    ("added", "in_memory"), [*((name, False) for name in ADDED), ("nothing", True), ("shared curvature", True)]
)
class TestRefused:
    def refused(self, run, kind, added, in_memory, **data):
        before = {path.name: path.stat().st_mtime_ns for path in (run.folder / "fit").glob("[!.]*")}
        with pytest.raises(DataMismatchError, match=f"the {kind} data are not those of the existing fit: .*dirpath="):
            run.complete(ADDED[added], in_memory=in_memory, **data)
        assert {path.name: path.stat().st_mtime_ns for path in (run.folder / "fit").glob("[!.]*")} == before

    @pytest.mark.parametrize("other", list(OTHER_CALIBRATION))
    def test_another_calibration_split(self, run, added, in_memory, other):
        held_out = DataLoader(OTHER_CALIBRATION[other], batch_size=16)
        self.refused(run, "held-out", added, in_memory, held_out=held_out)

    @pytest.mark.parametrize("other", list(OTHER_TRAINING))
    def test_other_training_data(self, run, added, in_memory, other):
        training = DataLoader(OTHER_TRAINING[other], batch_size=16, shuffle=False)
        self.refused(run, "training", added, in_memory, training=training)


@pytest.mark.parametrize("added", list(ADDED))
def test_another_order_batch_size_and_padding_are_the_same_data(tmp_path, run, added):
    def padded(rows):
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    training = DataLoader(ToyData(160, 1), batch_size=7, shuffle=False, collate_fn=padded)
    held_out = loader(112, 2, shuffle=True, batch_size=9)
    fitted = run.complete(ADDED[added], training, held_out)
    assert fitted.fit_id == run.first.fitted.fit_id
    assert set(load_fit(run.folder / "fit")[0].methods) >= {"laplace_lpo"}


class Augmented(ToyData):
    """One token after the first is another whenever an example is read."""

    def __getitem__(self, index):
        found = super().__getitem__(index)
        ids = found["input_ids"].clone()
        ids[np.random.randint(1, 6)] = np.random.randint(4, 24)
        return {**found, "input_ids": ids}


class OtherOrder(torch.utils.data.Sampler):
    """An order from a random state that nothing seeds."""

    def __len__(self):
        return 160

    def __iter__(self):
        return iter(np.random.permutation(160).tolist())


@pytest.mark.parametrize("added", ["without curvature", "new curvature"])
@pytest.mark.parametrize(
    ("training", "options"),
    [
        (lambda: DataLoader(Augmented(160, 1), 16), {}),
        (lambda: DataLoader(Augmented(160, 1), 16, shuffle=True), {}),
        (lambda: DataLoader(ToyData(160, 1), 24, sampler=OtherOrder(), drop_last=True), {}),
        (lambda: DataLoader(ToyData(160, 1), 16, sampler=OtherOrder()), {"limit_train_batches": 5}),
    ],
    ids=["augmented", "augmented and shuffled", "drop_last", "limit_train_batches"],
)
def test_training_data_that_differ_in_every_pass(tmp_path, added, training, options, caplog):
    module, folder = ToyModule(), str(tmp_path / "fit")
    first = BayesianMoECallback(METHODS, dirpath=folder)
    trainer(tmp_path, [first], max_epochs=1, **options).fit(module, training(), calibration_loader())
    caplog.clear()
    callback = BayesianMoECallback([*METHODS, *ADDED[added]], dirpath=folder)
    callback.fit_posterior(
        module,
        trainer=trainer(tmp_path, [callback], **options),
        train_dataloaders=training(),
        val_dataloaders=calibration_loader(),
    )
    assert len(callback.fitted.methods) == 2
    assert len([r for r in caplog.records if "they differ from one pass to the next" in r.getMessage()]) <= 1


def test_a_stream_that_is_read_once(tmp_path):
    """Nothing of it may be lost to the comparison; the curvature pass itself compares."""
    run = Run(tmp_path)

    class Once(torch.utils.data.IterableDataset):
        def __init__(self, data):
            self.rows = iter([data[index] for index in range(len(data))])

        def __iter__(self):
            return self.rows

    def stream(data):
        return DataLoader(Once(data), batch_size=16)

    def complete(data):
        added = (LaplaceEvidence(prior_mean="zero", curvature=Curvature(rank=2)),)
        callback = BayesianMoECallback([*METHODS, *added], dirpath=str(tmp_path / "fit"))
        callback.fit_posterior(
            run.module,
            trainer=trainer(tmp_path, [callback], limit_train_batches=10),
            train_dataloaders=stream(data),
            val_dataloaders=calibration_loader(),
        )
        return callback.fitted

    with pytest.raises(DataMismatchError, match="the training data are not those of the existing fit: other"):
        complete(ToyData(160, 7))
    assert "laplace_evidence" in complete(ToyData(160, 1)).methods


def test_too_few_inputs_for_an_added_method_are_told_before_the_passes(tmp_path):
    seen = []

    def class_logits(module, batch):
        seen.append(torch.is_grad_enabled())
        return module.class_logits(batch)

    options = {"dirpath": str(tmp_path / "fit"), "class_logits": class_logits}
    module = ToyModule()
    first = BayesianMoECallback([LaplaceEvidence(prior_mean="zero")], **options)
    trainer(tmp_path, [first], max_epochs=1).fit(module, loader(64, 1), loader(48, 2))
    seen.clear()
    more = BayesianMoECallback([LaplaceEvidence(prior_mean="zero"), EvidenceTemperature(prior_mean="zero")], **options)
    with pytest.raises(NeedsError, match=r"evidence_temperature needs at least 100 inputs .* there are 48; add"):
        more.fit_posterior(
            module, trainer=trainer(tmp_path, [more]), train_dataloaders=loader(64, 1), val_dataloaders=loader(48, 2)
        )
    assert len(seen) == 1 + 3  # of three batches: the first, then all
    assert not any(seen)
