"""What is timed in turn with what, on a clock that only actions move."""

from __future__ import annotations

import gc
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from bmoe_lightning.methods import FitResult, get_method
from bmoe_lightning.methods.base import MemberFit
from bmoe_lightning.methods.needs import Needs
from recipes.paper import method_cost
from recipes.paper.method_cost import OneMethod, Reference
from recipes.paper.report import Timing

OWN, OTHER = MemberFit({}, {}), MemberFit({}, {})


@dataclass
class Members:
    """A method whose members take time to load: the first has the run's fit, the others one of their own."""

    name: str
    number: int
    tell: object

    needs = Needs()
    is_fitted_method = True
    curvatures = ()

    def members(self, model, state, snapshots):
        return [self.member(index) for index in range(self.number)]

    @contextmanager
    def member(self, index):
        if self.number > 1:
            self.tell(f"load {index}", 100.0)
        yield OTHER if index else None
        if self.number > 1:
            self.tell(f"unload {index}", 100.0)


class Fake(OneMethod):
    """Measures `Members`, without a model."""

    device = torch.device("cpu")

    def peak_bytes(self):
        self.method.tell(f"{self.method.name}: memory", 1000.0)
        return 200, 100

    def fit(self, methods):
        self.method.tell(f"{self.method.name}: fit", 50.0)
        return FitResult()

    def own_fit(self, fitted):
        return OWN

    def predict_batch(self, fit, seed, batch):
        words = {id(OWN): "", id(OTHER): " with its fit"}[id(fit)]
        self.method.tell(f"{self.method.name}: {batch}{words}", None)

    def _batches(self, *, single=False):
        return ["first", "second"] if single else ["all"]


@pytest.fixture
def found(clock, monkeypatch):
    """The cost of a method of two members beside a reference, and what happened meanwhile."""
    monkeypatch.setattr(gc, "collect", lambda: 0)  # takes longer than all else
    happened = []

    def tell(what, duration):
        happened.append(what)
        # Every time of the reference is longer than the one before, so that no two can be taken for one another.
        clock.advance(duration or (7.0 if what.startswith("own") else float(happened.count(what))))

    def one(name, number):
        method = Members(name, number, tell)
        return Fake(method, method, None, nn.Linear(1, 1), None, SimpleNamespace(fit_folder=None))

    cost = one("own", 2).cost(Reference(one("reference", 1), FitResult(), 200, 100))
    return cost, happened


MEMBERS = ["load 0", "own: all", "unload 0", "load 1", "own: all with its fit", "unload 1"]


def alone(member, words=""):
    """What happens where one member predicts questions alone."""
    both = [f"own: first{words}", "reference: first"]
    return [f"load {member}", *both, *both, f"own: second{words}", "reference: second", f"unload {member}"]


def test_what_runs_in_turn(found):
    _, happened = found
    fit = ["reference: all", "own: fit", "reference: all"]
    assert happened == ["own: memory", *fit, *["reference: all", *MEMBERS] * 3, *alone(0), *alone(1, " with its fit")]


def test_the_fit_is_beside_the_predictions_before_and_after_it(found):
    assert found[0].fit == Timing((50.0, 50.0), (1.0, 2.0))


def test_the_predictions_are_beside_those_of_the_reference_in_the_same_round(found):
    # Members are loaded for all questions, which is part of the time.
    assert found[0].predict == Timing((4 * 100.0 + 2 * 7.0,) * 3, (3.0, 4.0, 5.0))


def test_the_latency_is_the_sum_over_members_without_the_time_of_loading_them(found):
    # The reference predicts the first question for the 2nd and the 4th time, the second one for the 1st and the 2nd.
    assert found[0].latency == Timing((14.0, 14.0), (3.0, 1.5))


def test_memory_is_that_of_the_method_and_of_the_reference(found):
    assert (found[0].fit_bytes, found[0].predict_bytes, found[0].reference_bytes) == (200, 100, 100)


def test_the_fits_to_further_runs_are_part_of_the_fit_time(monkeypatch):
    fitted = []
    mixture = replace(get_method("laplace_mixture"), size=4)

    class Fitted(OneMethod):
        device = None

        def fit(self, methods):
            fitted.append(methods)

    monkeypatch.setattr(method_cost, "seconds", lambda action, _: (action(), 1.0)[1])
    one = Fitted(mixture, replace(mixture, runs=("a",) * 3, fits=("b",) * 3), None, None, None, None)
    timing, _ = one._timed_fit(SimpleNamespace(predict=lambda: None))
    assert fitted == [[one.stored], mixture.needs.run_methods]
    assert timing == Timing((4.0, 4.0), (1.0, 1.0))
