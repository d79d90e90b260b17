import pytest
import torch

from bmoe_lightning.report import MethodResult

LABELS = {"map": "MAP", "temperature": "Temperature scaling", "laplace_evidence": "Laplace (evidence)"}
SHARPNESS = {"map": 3.0, "temperature": 1.0, "laplace_evidence": 1.2}


def make(method, seed, number=60, **changes):
    items = torch.Generator().manual_seed(0)
    logits = torch.randn(number, 4, generator=items, dtype=torch.float64)
    logits[::3, 3] = -torch.inf
    target = torch.multinomial(logits.softmax(1), 1, generator=items).squeeze(1)
    noise = torch.randn(number, 4, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    values = {
        "method": method,
        "label": LABELS[method],
        "seed": seed,
        "log_probs": (SHARPNESS[method] * (logits + 0.2 * noise)).log_softmax(1),
        "target": target,
        "ids": tuple(f"item-{i}" for i in range(number)),
        "extra": {"temperature": 2.0 + seed} if method == "temperature" else {},
        "hyperparameters": {"num_samples": 100} if method == "laplace_evidence" else {},
    }
    return MethodResult(**{**values, **changes})


@pytest.fixture
def make_result():
    return make


@pytest.fixture
def results():
    return [make(method, seed) for seed in (0, 1) for method in LABELS]


@pytest.fixture
def one_seed():
    return [make(method, 0) for method in LABELS]
