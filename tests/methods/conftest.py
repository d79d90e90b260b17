"""A small float64 model, and questions with ragged choices; what several modules only look at is made once in each."""

import pytest
import torch
from oracles.models import answer_logits, split, toy_batch, toy_model
from workbench_cases import EVERYTHING, calibration_batches, moved_weights, train_batches

from bmoe_lightning.methods import fit_methods


@pytest.fixture
def model():
    return toy_model()


@pytest.fixture
def batches():
    batch = toy_batch(num_rows=10)
    absent = torch.zeros(10, 4, dtype=torch.bool)
    absent[::3, 3] = True
    batch["absent"] = absent
    batch["labels"] = torch.where(absent[:, 3], batch["labels"] % 3, batch["labels"])
    return split(batch, 4, 3, 3)


@pytest.fixture(scope="module")
def tuned():
    """A model whose weights `prior_mean` has from before a fine-tuning."""
    return toy_model()


@pytest.fixture(scope="module")
def prior_mean(tuned):
    return moved_weights(tuned)


@pytest.fixture(scope="module")
def train():
    return train_batches()


@pytest.fixture(scope="module")
def calibration(tuned):
    return calibration_batches(tuned)


@pytest.fixture(scope="module")
def everything(tuned, train, calibration, prior_mean):
    """The fit of all methods."""
    return fit_methods(EVERYTHING, tuned, answer_logits, train, calibration, prior_mean=prior_mean)
