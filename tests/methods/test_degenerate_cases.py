"""Every method on data and models without information: finite and normalised, or refused in a sentence that names it.

A fit that ended at a bound says so: in the fit, in the log, and below the table.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles.models import ANSWERS, tiny_qwen

from bmoe_lightning import testing
from bmoe_lightning.curvature import Curvature
from bmoe_lightning.methods import evaluate, fit_methods, get_method
from bmoe_lightning.methods.options import trial_options
from bmoe_lightning.methods.registry import built_in_names
from bmoe_lightning.methods.snapshots import swapped_weights
from bmoe_lightning.methods.storage import save_fit
from bmoe_lightning.report import MethodResult, SummarySettings, results_table, summarise
from bmoe_lightning.report.table import footnotes

NUM_CLASSES = len(ANSWERS)
ENDS = (1e-2, 1e2, 1e-4, 1e8, 1e-8, 1e12)  # of the search ranges of temperatures and precisions


def batches_of(size, count, seed):
    generator = torch.Generator().manual_seed(seed)
    return [{"ids": torch.randint(30, (size, 5), generator=generator)} for _ in range(count)]


def drawn(logits, batch):
    """Labels that depend on the tokens alone."""
    return batch["ids"].sum(1) % NUM_CLASSES


def first(logits, batch):
    return torch.zeros(len(logits), dtype=torch.int64)


def predicted(logits, batch):
    return logits.detach().argmax(1)


def least_likely(logits, batch):
    return logits.detach().argmin(1)


def without_gradient(logits, batch):
    """Logits that depend on the tokens alone, but are still a function of the experts."""
    return 0 * logits + 3 * torch.nn.functional.one_hot(batch["ids"][:, 0] % NUM_CLASSES, NUM_CLASSES)


@dataclass(frozen=True)
class Case:
    """What a model answers, the labels, and the methods that refuse it: the reason, by the name of the method."""

    logits: Callable[[Any, Any], Any] = lambda logits, batch: logits
    labels: Callable[[Any, Any], Any] = drawn
    dtype: torch.dtype = torch.float64
    train: tuple[int, int] = (4, 2)
    held_out: tuple[int, int] = (8, 1)
    model: Mapping[str, Any] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)


ZERO_CURVATURE = {
    **dict.fromkeys(
        ("laplace_evidence", "laplace_temperature", "evidence_temperature"), "curvature is zero everywhere"
    ),
    "leave_one_out_temperature": "what it covers of their gradient is unknown: no weight that was trained affects a",
}
CASES = {
    "one example": Case(
        train=(1, 1), held_out=(1, 1), refused={"swag_router": "needs the weights of at least 2 steps"}
    ),
    "zero gradients": Case(logits=without_gradient, refused=ZERO_CURVATURE),
    "float16": Case(
        dtype=torch.float16,
        refused={"leave_one_out_temperature": "gradient is unknown: the backward pass runs in float16"},
    ),
}
SLOW_CASES = {
    "all wrong": Case(labels=least_likely),
    "all correct": Case(labels=predicted),
    "one label": Case(labels=first),
    "constant logits": Case(logits=lambda logits, batch: 0 * logits, refused=ZERO_CURVATURE),
    "equal logits": Case(logits=lambda logits, batch: logits[:, :1].expand(-1, NUM_CLASSES)),
    "saturated logits": Case(logits=lambda logits, batch: 300 * logits),
    "idle experts": Case(model={"num_experts": 32}, train=(1, 2)),
}


def class_logits_of(case):
    def class_logits(model, batch):
        own = model(input_ids=batch["ids"], use_cache=False).logits[:, -1, list(ANSWERS)]
        logits = case.logits(own, batch)
        return logits, case.labels(logits, batch)

    return class_logits


@dataclass(frozen=True)
class Table:
    """A model of a case, and what the methods that it can have are fitted to."""

    case: Case
    model: Any
    before: Mapping[str, Any]
    snapshots: list[Path]
    methods: tuple[Any, ...]

    def fit(self, methods):
        train, held_out = (batches_of(*shape, seed) for seed, shape in enumerate((self.case.train, self.case.held_out)))
        data = class_logits_of(self.case), train, held_out
        return fit_methods(methods, self.model, *data, prior_mean=self.before, snapshots=self.snapshots)


def table_of(case, folder, *, lora):
    """The table of the methods for LoRA, or of all others, as `check_method` has them."""
    model = tiny_qwen(dtype=torch.float32, **case.model)
    if lora:
        testing._add_lora(model)
    model.to(case.dtype)
    chosen = [get_method(name) for name in built_in_names()]
    chosen = [method for method in chosen if method.needs.lora == lora]
    chosen = [replace(method, **cheap(method)).with_defaults(Curvature(rank=2)) for method in chosen]
    before = {}
    for method in chosen:
        before |= {name: weight.clone() for name, weight in testing._weights(method, model).items()}
    table = Table(case, model, before, testing._fine_tuned(model, folder), ())
    return replace(table, methods=tuple(with_runs(table, method, folder) for method in chosen))


def cheap(method):
    """Options with which a method is fitted and predicts in little time."""
    samples = {"num_samples", "link_samples"} & method.options().keys()
    return {**dict.fromkeys(samples, 20), **trial_options(type(method))}


def with_runs(table, method, folder):
    """The method with the snapshots as further runs, and fits to these."""
    runs = table.snapshots[: method.needs.runs]
    if not runs:
        return method
    options = {"runs": tuple(map(str, runs))}
    if method.needs.run_methods:
        options["fits"] = tuple(str(folder / f"fit-{number}") for number in range(len(runs)))
        for run, path in zip(runs, options["fits"], strict=True):
            with swapped_weights(table.model, run):
                save_fit(Path(path), table.fit(method.needs.run_methods))
    return replace(method, **options)


def at_an_end(state):
    """Whether a number of a state is at an end of a search range."""
    values = [
        float(value) for key in ("temperature", "prior_precision") if key in state for value in state[key].view(-1)
    ]
    return any(abs(math.log(value / end)) < 0.1 for value in values for end in ENDS)


def check_predictions(name, found):
    present = found.logits > -torch.inf
    log_probs = found.log_probs
    assert bool(log_probs[present].isfinite().all()), name
    assert bool((log_probs[~present] == -torch.inf).all()), name
    torch.testing.assert_close(log_probs.exp().sum(1), torch.ones(len(log_probs), dtype=torch.float64), msg=name)
    for score, values in found.uncertainty.items():
        assert bool(values.isfinite().all()), (name, score)


def check_warned(table, fit, found, log):
    """Each warning is in the log with the method's name, and a mark and a footnote of the results table."""
    rows = summarise(
        [
            MethodResult(
                method=method.name,
                label=method.name,
                seed=0,
                log_probs=found[method.name].log_probs,
                target=found[method.name].labels,
                ids=tuple(map(str, range(len(found[method.name].labels)))),
                warnings=found[method.name].warnings,
            )
            for method in table
        ],
        SummarySettings(num_samples=2),
    )
    shown, marks = results_table(rows, width=10_000), footnotes(rows)
    for method in table:
        if method.name not in fit.methods:  # without anything to fit
            continue
        fitted = fit.methods[method.name]
        assert not at_an_end(fitted.state) or fitted.warnings, method.name
        (label,) = [line.split("  ")[0] for line in shown.splitlines() if line.split(" ")[0] == method.name]
        for sentence in fitted.warnings:
            assert any(method.name in told and sentence in told for told in log), (method.name, sentence)
            assert marks[sentence] in label.split(" ")
            assert f"\n{marks[sentence]} " in shown


@pytest.mark.filterwarnings("ignore:no token that affects a logit went through")
@pytest.mark.parametrize("lora", [False, True], ids=["experts", "lora"])
@pytest.mark.parametrize("case", [*CASES, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW_CASES)])
def test_finite_and_normalised_or_refused(case, lora, tmp_path, caplog):
    table = table_of({**CASES, **SLOW_CASES}[case], tmp_path, lora=lora)
    accepted = []
    for method in table.methods:
        if method.name not in table.case.refused:
            accepted.append(method)
            continue
        with pytest.raises(ValueError, match=table.case.refused[method.name]) as caught:
            table.fit([method])
        assert method.name in str(caught.value)
    with caplog.at_level(logging.WARNING):
        fit = table.fit(accepted)
    if case == "idle experts":
        assert lora or any((layer.slots == 0).any() for p in fit.posteriors.values() for layer in p.factors.layers)
    # Labels that a prediction has nothing to do with: members of an ensemble have weights of their own.
    class_logits = class_logits_of(replace(table.case, labels=drawn))
    found = evaluate(accepted, fit, table.model, class_logits, batches_of(3, 1, seed=5), table.snapshots)
    for method in accepted:
        check_predictions(method.name, found[method.name])
    check_warned(accepted, fit, found, [record.message for record in caplog.records])
