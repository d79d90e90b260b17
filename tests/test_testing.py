"""The contract of methods: every registered method keeps it, and each violation is noticed."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import nn

from bmoe_lightning.methods import MAP, Method, TemperatureScaling, get_method, method_names, option
from bmoe_lightning.methods.needs import Needs
from bmoe_lightning.methods.options import trial_options
from bmoe_lightning.testing import check_method


@pytest.mark.filterwarnings(
    "ignore:the fitted temperature", "ignore:LPO ended at the limit", "ignore:LPO.s prior precision"
)
@pytest.mark.parametrize("name", method_names())
def test_every_registered_method_keeps_the_contract(name):
    method = get_method(name)
    # The scale of router noise takes a pass through the model for each sample and candidate.
    check_method(replace(method, **trial_options(type(method))) if method.needs.routers else method)


@dataclass(frozen=True)
class Faulty(Method):
    """A method with a fault."""

    name: str = "faulty"
    label: str = "Faulty"


def faulty(**members):
    return dataclass(frozen=True)(type("Violating", (Faulty,), {"__doc__": "A method with a fault.", **members}))()


def plain(batch):
    return batch.logits.log_softmax(-1)


def unnormalised(self, batch, state):
    return plain(batch) - 0.1


def single_precision(self, batch, state):
    return plain(batch).float()


def absent_class(self, batch, state):
    return torch.where(batch.logits == -torch.inf, -50.0, batch.logits).log_softmax(-1)


def mixes_the_batch(self, batch, state):
    return (batch.logits - batch.logits.nan_to_num(neginf=0).mean(0)).log_softmax(-1)


def draws(self, batch, state):
    torch.rand(1)
    return plain(batch)


def varies(self, batch, state):
    with torch.random.fork_rng(devices=[]):
        torch.seed()
        noise = torch.randn(batch.logits.shape, dtype=torch.float64)
    return (batch.logits + noise).log_softmax(-1)


def trains(self, batch, state):
    batch.model.train(False)
    return plain(batch)


def moves_weights(self, batch, state):
    with torch.no_grad():
        next(batch.model.parameters()).mul_(1.0001)
    return plain(batch)


def leaves_gradients(self, batch, state):
    parameter = next(batch.model.parameters())
    parameter.grad = torch.zeros_like(parameter)
    return plain(batch)


def swallows(self, batch, state):
    try:
        return plain(batch)
    except KeyboardInterrupt:
        return torch.zeros(4, 4)


@pytest.mark.parametrize(
    ("log_probs", "message"),
    [
        (unnormalised, "do not sum to 1"),
        (single_precision, "float32, not float64"),
        (absent_class, "an absent class has a probability"),
        (mixes_the_batch, "with another batch size"),
        (draws, "global random state"),
        (varies, "the same batch differently the second time"),
        (trains, "changed the training mode"),
        (moves_weights, "changed weights|with another batch size|the second time|after its state"),
        (leaves_gradients, "left gradients"),
        (swallows, "swallowed an exception"),
    ],
)
def test_a_faulty_prediction_is_noticed(log_probs, message):
    with pytest.raises(AssertionError, match=message):
        check_method(faulty(log_probs=log_probs))


@pytest.mark.parametrize(
    ("score", "message"),
    [
        (lambda logits: logits, r"has shape \[8, 4\], not \[8\]"),
        (lambda logits: logits.amax(1).float(), "float32, not float64"),
        (lambda logits: logits.amin(1), "is not finite"),
        (lambda logits: logits.amax(1) - logits.amax(), "with another batch size, score differs"),
    ],
)
def test_a_faulty_score_of_uncertainty_is_noticed(score, message):
    def uncertainty(self, batch, state):
        return {"score": score(batch.logits)}

    with pytest.raises(AssertionError, match=message):
        check_method(faulty(log_probs=lambda self, batch, state: plain(batch), uncertainty=uncertainty))


def test_a_faulty_declaration_is_noticed():
    class Mutable(MAP):
        """Not a dataclass of its own, but MAP's."""

    check_method(Mutable())

    @dataclass(frozen=True)
    class Undocumented(MAP):
        """A method with an option that nobody can look up."""

        depth: int = field(default=3)

    with pytest.raises(AssertionError, match=r"options without a help text: \['depth'\]"):
        check_method(Undocumented())

    @dataclass(frozen=True)
    class Silent(MAP):
        pass

    Silent.__doc__ = ""
    with pytest.raises(AssertionError, match="no docstring"):
        check_method(Silent())


@dataclass(frozen=True)
class Forgetful(TemperatureScaling):
    """Predicts with something that is not in its state."""

    name: str = "forgetful"
    depth: int = option(3, "Nothing.")

    def fit(self, work):
        object.__setattr__(self, "_temperature", 2.0)
        return {"temperature": [2.0]}

    def log_probs(self, batch, state):
        return (batch.logits / self._temperature).log_softmax(-1)


def test_a_state_of_anything_but_tensors_is_noticed():
    with pytest.raises((AssertionError, AttributeError)):
        check_method(Forgetful())


def test_needs_are_believed():
    @dataclass(frozen=True)
    class Sampling(MAP):
        """Draws masks for each batch."""

        name: str = "sampling"

        @property
        def needs(self):
            return Needs(expert_dropout=True)

        def log_probs(self, batch, state):
            generator = torch.Generator().manual_seed(batch.seed)
            noise = torch.randn(batch.logits.shape, generator=generator, dtype=torch.float64)
            return (batch.logits + noise).log_softmax(-1)

    check_method(Sampling())


def test_the_model_is_small():
    from bmoe_lightning.testing import tiny_model

    assert isinstance(tiny_model(), nn.Module)
    assert sum(p.numel() for p in tiny_model().parameters()) < 20_000
    state = torch.get_rng_state()
    tiny_model(3)
    assert torch.equal(torch.get_rng_state(), state)
