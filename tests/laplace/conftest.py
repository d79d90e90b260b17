import pytest
import torch
from oracles.models import answer_logits, split, toy_batch, toy_model

from bmoe_lightning.curvature import collect_factors
from bmoe_lightning.laplace import LaplacePosterior


@pytest.fixture(scope="module")
def fitted():
    """A model, its posterior, and a labelled validation set on which the model is too sure: three layers."""
    torch.manual_seed(0)
    model = toy_model(num_layers=3)
    with torch.no_grad():
        model.head.weight.mul_(3)
    posterior = LaplacePosterior(collect_factors(model, answer_logits, [toy_batch(num_rows=60, seed=11)], rank=3))
    batch = toy_batch(num_rows=90, seed=12)
    logits = answer_logits(model, batch)[0].detach()
    generator = torch.Generator().manual_seed(4)
    batch["labels"] = torch.multinomial((logits / 2.5).softmax(-1), 1, generator=generator).squeeze(1)
    return model, posterior, split(batch, 40, 50)


@pytest.fixture(scope="module")
def cache(fitted):
    model, posterior, batches = fitted
    return posterior.validation_cache(model, answer_logits, batches)
