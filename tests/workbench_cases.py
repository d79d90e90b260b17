"""What the tests of the workbench share: all methods that are fitted, and what they look at."""

from __future__ import annotations

import pytest
import torch
from methods_cases import RANK3
from oracles.models import answer_logits, split, toy_batch

from bmoe_lightning.methods import (
    MAP,
    CheckpointEnsemble,
    DeepEnsemble,
    EvidenceTemperature,
    LaplaceEvidence,
    LaplaceLPO,
    LaplaceTemperature,
    MCDropout,
    ShrunkTemperature,
    TemperatureScaling,
)

DOWN = ("layers.0.mixture.crew.down_proj", "layers.1.mixture.crew.down_proj")
FITTED = (TemperatureScaling, LaplaceEvidence, LaplaceLPO, LaplaceTemperature, EvidenceTemperature, ShrunkTemperature)


def methods_of(*kinds, curvature=RANK3, **options):
    made = []
    for kind in kinds:
        fitting = {name: value for name, value in options.items() if name in kind.__dataclass_fields__}
        made.append(kind(**fitting).with_defaults(curvature))
    return made


EVERYTHING = methods_of(MAP, MCDropout, CheckpointEnsemble, DeepEnsemble, *FITTED, num_samples=500)


def identity(batch):
    """Survives the shallow copy in which a batch is handed over."""
    return batch["ids"].data_ptr()


def twice(batches):
    """The first batches of a curvature pass run again for its share of the trained weights' gradient."""
    return [batch for batch in batches for _ in range(2)]


class Counted:
    """`answer_logits` that remembers the batches it was asked about."""

    def __init__(self):
        self.seen = []

    def __call__(self, model, batch):
        self.seen.append(identity(batch))
        return answer_logits(model, batch)


class Untouchable:
    def __iter__(self):
        raise AssertionError("data that no method needs were looked at")


def state(fit, name):
    return fit.methods[name].state


def precision(fit, name):
    return state(fit, name)["prior_precision"].tolist()


def whole(model, batches):
    with torch.no_grad():
        pairs = [answer_logits(model, batch) for batch in batches]
    return torch.cat([logits for logits, _ in pairs]), torch.cat([labels for _, labels in pairs])


def train_batches():
    return split(toy_batch(num_rows=60, seed=3), 20, 20, 20)


def calibration_batches(model):
    """Labels drawn from softmax(f / 2): a temperature of about 2 fits them."""
    batch = toy_batch(num_rows=112, seed=4)
    with torch.no_grad():
        probabilities = (answer_logits(model, batch)[0] / 2).softmax(-1)
    labels = torch.multinomial(probabilities, 1, generator=torch.Generator().manual_seed(6)).squeeze(1)
    return split({**batch, "labels": labels}, 40, 40, 32)


def moved_weights(model):
    """Weights from before a fine-tuning that moved each by about .1."""
    generator = torch.Generator().manual_seed(5)
    return {
        name: p.detach() + 0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
        for name in DOWN
        for p in [model.get_parameter(name)]
    }


def distances(tuned, reference):
    return [
        float((tuned.get_parameter(name).detach() - (0 if reference is None else reference[name])).square().sum())
        for name in DOWN
    ]


def assert_stationary(posterior, precisions, squared_distances):
    for layer, value, distance in zip(posterior.factors.layers, precisions, squared_distances, strict=True):
        s = layer.curvature()
        assert float((s / (value + s)).sum()) == pytest.approx(value * distance, rel=1e-6)
