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


def test_the_means_over_fits_of_either_kind(study, report_of):
    warned = {("home", 0), ("judged", 1), ("judged", 4)}
    report = report_of(with_warnings(study, warned))
    section = by_warning.section(report)
    (found,) = (entry for entry in section.details["by_warning"] if entry["data"] == "in_distribution")
    assert (found["method"], found["other"], found["relative"]) == (METHOD, OTHER, True)
    assert {(fit["tested_on"], fit["seed"]) for fit in found["with"]["fits"]} == warned
    nlls = {True: {METHOD: [], OTHER: []}, False: {METHOD: [], OTHER: []}}
    for name in study.labels:
        for result in study.results(name, name):
            if result.method in (METHOD, OTHER):
                value = float(negative_log_likelihood(result.log_probs, result.target))
                nlls[(name, result.seed) in warned][result.method].append(value)
    for kind, key in ((True, "with"), (False, "without")):
        expected = sum(nlls[kind][METHOD]) / sum(nlls[kind][OTHER]) - 1
        assert found[key]["value"] == pytest.approx(expected, abs=1e-12)
    assert "| NLL, Evidence temperature over Temperature scaling | in distribution | 12 |" in section.text[0]


def test_warnings_that_both_methods_have_are_not_its_own(study, report_of):
    assert by_warning.section(report_of(with_warnings(study, set()))) is None
