"""Claims on fits with a warning and on those without."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bmoe_lightning.metrics import negative_log_likelihood
from recipes.paper.report import by_warning

METHOD, OTHER, OF_ALL = "evidence_temperature", "temperature", "the accuracy is not above chance"


def with_warnings(study, warned):
    """The study in which some fits of the method warn by themselves, and all methods of seed 0 warn of chance."""

    def changed(outcome, result):
        warnings = (OF_ALL,) if result.seed == 0 else ()
        if result.method == METHOD and (outcome.tested_on, result.seed) in warned:
            warnings = (*warnings, "it is doubtful")
        return replace(result, warnings=warnings)

    outcomes = tuple(
        replace(outcome, results=tuple(changed(outcome, result) for result in outcome.results))
        for outcome in study.outcomes
    )
    return replace(study, outcomes=outcomes)


def nlls(study, name, seed):
    found = {r.method: r for r in study.results(name, name) if r.seed == seed}
    return [float(negative_log_likelihood(found[m].log_probs, found[m].target)) for m in (METHOD, OTHER)]


def ratio(study, fits):
    ours, others = zip(*(nlls(study, *fit) for fit in fits), strict=True)
    return sum(ours) / sum(others) - 1


def test_the_means_over_fits_of_either_kind(study, report_of):
    warned = {("home", 0), ("judged", 0), ("judged", 1), ("judged", 2), ("judged", 3), ("judged", 4)}
    plain = {(name, seed) for name in study.labels for seed in range(5)} - warned
    section = by_warning.section(report_of(with_warnings(study, warned)))
    (found,) = (entry for entry in section.details["by_warning"] if entry["data"] == "in_distribution")
    assert (found["method"], found["other"], found["relative"]) == (METHOD, OTHER, True)
    assert {(fit["tested_on"], fit["seed"]) for fit in found["with"]["fits"]} == warned
    assert found["with"]["value"] == pytest.approx(ratio(study, warned), abs=1e-12)
    assert found["without"]["value"] == pytest.approx(ratio(study, plain), abs=1e-12)
    # All fits to Judged are warned of and none of the others', so that Home alone has both.
    change = ratio(study, {("home", 0)}) - ratio(study, {("home", seed) for seed in range(1, 5)})
    assert found["change"] == {"data": ["home"], "value": pytest.approx(change, abs=1e-12)}
    assert "| NLL, Evidence temperature over Temperature scaling | in distribution |" in section.text[0]
    assert "(9) |" in section.text[0]
    assert "(6) |" in section.text[0]


def test_nothing_is_told_of_few_fits(study, report_of):
    assert by_warning.section(report_of(with_warnings(study, {("judged", seed) for seed in range(4)}))) is None


def test_warnings_that_both_methods_have_are_not_its_own(study, report_of):
    assert by_warning.section(report_of(with_warnings(study, set()))) is None


def test_the_numbers_of_a_warning_do_not_tell_fits_apart(study, report_of):
    def changed(result):
        number = {METHOD: 1.5, OTHER: 2.5}.get(result.method, 3.5)
        return replace(result, warnings=(f"the precision is {number} (layer {number})",) if result.seed < 3 else ())

    outcomes = tuple(replace(o, results=tuple(map(changed, o.results))) for o in study.outcomes)
    assert by_warning.section(report_of(replace(study, outcomes=outcomes))) is None
