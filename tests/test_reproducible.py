"""What may be changed about a command without changing its numbers, and by how much: one row a change.

docs/faults.md has the same table.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import lightning as L
import pytest
import torch
from fit_files import fitted_states
from test_distributed import read, run_script
from toy import ToyModule, calibration_loader, loader, trainer

from bmoe_lightning import BayesianMoECallback
from bmoe_lightning.curvature import Curvature

METHODS = ("map", "temperature", "laplace_evidence", "checkpoint_ensemble")
FITTED = METHODS[:3]
TRAIN = 64
PAGE = Path(__file__).parents[1] / "docs" / "faults.md"


@dataclass(frozen=True)
class Row:
    """A change, and what it may change.

    Attributes:
        changed: What is changed.
        tolerance: Largest absolute difference of a log-probability; 0 for the same bits of everything.
        options: What is passed to `command`.
        marks: Marks of pytest.
    """

    changed: str
    tolerance: float
    options: dict = field(default_factory=dict)
    marks: tuple = ()

    def in_words(self):
        bound = "the same bits" if self.tolerance == 0 else f"{self.tolerance:.0e}".replace("e-0", "e-")
        return f"| {self.changed} | {bound} |"


TABLE = (
    Row("nothing: the same command again", 0),
    Row("the state of the global random number generators after the seed is set", 0, {"draws": 5}),
    Row("other methods beside one", 0, {"methods": ("map", "laplace_evidence")}),
    Row("the number of batches between checkpoints of the curvature pass", 0, {"every": 1}),
    Row("the batch size of the test split", 1e-6, {"test": 7}),
    Row("the batch size of the calibration split", 1e-5, {"calibration": 5}),
    Row("the batch size of the curvature pass", 1e-5, {"curvature": 4, "methods": FITTED}),
    Row("the number of threads", 1e-5, {"threads": 2}, (pytest.mark.slow,)),
)
RANKS = Row("the number of ranks, 1 or 2, in float64", 1e-6)


@contextmanager
def num_threads(number):
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def command(folder, *, methods=METHODS, every=None, draws=0, test=16, calibration=16, curvature=16, threads=1):
    """Train, fit and test; every tensor that was fitted, and the predictions of each method."""
    with num_threads(threads):
        L.seed_everything(3, verbose=False)
        module = ToyModule()
        torch.rand(draws)
        folder.mkdir()
        options = {"curvature": Curvature(rank=4, sketch="exact"), "curvature_checkpoint_every": every}
        callback = BayesianMoECallback(methods, dirpath=str(folder / "fit"), **options)
        run = trainer(folder, [callback], max_epochs=2, num_sanity_val_steps=0)
        held_out = calibration_loader() if calibration == 16 else loader(112, 2, batch_size=calibration)
        run.fit(module, loader(TRAIN, 1), held_out)
        if curvature != 16:  # of the pass alone: another batch size of the training trains other weights
            callback = BayesianMoECallback(methods, dirpath=str(folder / "again"), **options)
            before = {n: p.detach() for n, p in ToyModule().named_parameters() if "experts.down_proj" in n}
            run = trainer(folder, [callback], max_epochs=2)
            data = {"train_dataloaders": loader(TRAIN, 1, batch_size=curvature), "val_dataloaders": held_out}
            callback.fit_posterior(module, trainer=run, prior_mean=before, **data)
        run.test(module, loader(48, 3, batch_size=test), verbose=False)
    log_probs = {name: found.log_probs for name, found in callback.predictions["test"].items()}
    weights = {f"weights {name}": value for name, value in module.state_dict().items()}
    return log_probs, {**weights, **fitted_states(Path(callback.state_dict()["folder"]))}


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    return command(tmp_path_factory.mktemp("expected") / "run")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("row", [pytest.param(row, marks=row.marks, id=row.changed) for row in TABLE])
def test_table(row, expected, tmp_path):
    log_probs, states = command(tmp_path / "run", **row.options)
    assert log_probs.keys() == set(row.options.get("methods", METHODS))
    for name, found in log_probs.items():
        if row.tolerance:
            torch.testing.assert_close(found, expected[0][name], rtol=0, atol=row.tolerance)
        else:
            assert torch.equal(found, expected[0][name]), name
    if not row.tolerance:
        assert states.keys() <= expected[1].keys()
        assert [name for name, value in states.items() if not torch.equal(value, expected[1][name])] == []


@pytest.mark.filterwarnings("ignore")
def test_another_seed_is_noticed(expected, tmp_path, monkeypatch):
    """The table would not notice numbers that depend on nothing."""
    monkeypatch.setattr("toy.ToyModule.__init__.__defaults__", (1, 1e-2))
    log_probs, _ = command(tmp_path / "run")
    assert all(float((found - expected[0][name]).abs().max()) > 1e-2 for name, found in log_probs.items())


@pytest.mark.slow
def test_ranks(tmp_path):
    run_script(tmp_path, "few", 1, 2)
    _, expected = read(tmp_path, "test", 1, 0)
    for rank in (0, 1):
        _, found = read(tmp_path, "test", 2, rank)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=0, atol=RANKS.tolerance)


def test_the_page_has_the_table():
    text = PAGE.read_text(encoding="utf-8")
    assert [row.changed for row in (*TABLE, RANKS) if row.in_words() not in text] == []
