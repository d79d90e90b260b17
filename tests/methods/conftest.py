"""A small float64 model, and questions with ragged choices."""

import pytest
import torch
from oracles.models import split, toy_batch, toy_model


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
