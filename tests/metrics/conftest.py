import pytest
import torch


def _predictions(number=90, classes=4, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(number, classes, generator=generator, dtype=torch.float64)
    target = torch.multinomial((logits / 2).softmax(1), 1, generator=generator).squeeze(1)
    return logits.log_softmax(1).to(dtype), target


@pytest.fixture
def predictions():
    """A function that makes over-confident predictions and their targets."""
    return _predictions


@pytest.fixture
def binary():
    """A function that makes two-class predictions whose top label is class 0 with the given confidences."""

    def make(confidences, right):
        p = torch.tensor(confidences, dtype=torch.float64)
        return torch.stack([p, 1 - p], 1).log(), torch.tensor([0 if r else 1 for r in right])

    return make
