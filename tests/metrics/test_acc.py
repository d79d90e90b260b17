import pytest
import torch

from bmoe_lightning.metrics.acc import SPEC, accuracy


def test_against_a_loop(predictions):
    log_probs, target = predictions(300)
    rows = zip(log_probs.tolist(), target.tolist(), strict=True)
    right = [max(range(4), key=row.__getitem__) == y for row, y in rows]
    assert accuracy(log_probs, target).item() == pytest.approx(sum(right) / len(right), abs=1e-12)


def test_ties_go_to_the_first_class():
    log_probs = torch.full((2, 2), 0.5).log()
    assert accuracy(log_probs, torch.tensor([0, 1])) == 0.5


def test_higher_is_better():
    assert SPEC.header == "ACC ↑"
