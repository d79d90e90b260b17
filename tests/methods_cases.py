"""What the tests of methods share: fits with given states, and predictions of one method."""

import torch
from oracles.models import answer_logits

from bmoe_lightning.curvature import Curvature
from bmoe_lightning.laplace import LaplacePosterior
from bmoe_lightning.methods import BatchView, FitResult, evaluate
from bmoe_lightning.methods.fit_result import FittedMethod

RANK3 = Curvature(rank=3)


def fitted(*methods_and_states, posterior: LaplacePosterior | None = None, seed: int = 0) -> FitResult:
    """A fit with given states, `(method, state)` each, and one curvature for all of them."""
    methods = {
        method.name: FittedMethod(state, method.fit_options(), tuple(c.digest for c in method.curvatures))
        for method, state in methods_and_states
    }
    digests = {digest for entry in methods.values() for digest in entry.curvatures}
    return FitResult(methods=methods, posteriors=dict.fromkeys(digests, posterior) if posterior else {}, seed=seed)


def predict(method, model, batch, state=None, *, seed=0):
    """Log-probabilities of a batch under a method without curvature."""
    return method.log_probs(BatchView(model, answer_logits, batch, seed=seed), state or {})


def predictions(model, batches, *methods, snapshots=(), fit=None, class_logits=answer_logits):
    return evaluate(
        methods, fit or fitted(*((method, {}) for method in methods)), model, class_logits, batches, snapshots
    )


def drawn(temperature, count=400, scale=4.0, seed=0, ragged=True):
    """Logits, and labels drawn from `softmax(logits / temperature)`."""
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(count, 4, generator=generator, dtype=torch.float64)
    if ragged:
        logits[::3, 3] = -torch.inf
    labels = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator).squeeze(1)
    return logits, labels
