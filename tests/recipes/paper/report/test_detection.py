"""AUROC, AUPR and FPR95 of the report, from pairs of questions."""

from __future__ import annotations

import math
import statistics
from dataclasses import replace

import pytest
import torch

from recipes.paper.report import detection


def scores(result, kind):
    for row in result.log_probs.tolist():
        probabilities = [math.exp(value) for value in row]
        if kind == "max_probability":
            yield 1 - max(probabilities)
        else:
            yield -sum(p * math.log(p) for p in probabilities if p > 0)


def auroc(negative, positive):
    pairs = [(p > n) + (p == n) / 2 for n in negative for p in positive]
    return statistics.fmean(pairs)


def fpr95(negative, positive):
    threshold = sorted(positive, reverse=True)[math.ceil(0.95 * len(positive)) - 1]
    return statistics.fmean(value >= threshold for value in negative)


@pytest.fixture(scope="module")
def section(report):
    return detection.section(report)


def cell(section, grid_name, block, row, column):
    grid = next(grid for grid in section.linked_grids if grid.name == grid_name)
    block = next(found for found in grid.blocks if found.title == block)
    row = next(found for found in block.rows if found.key == row)
    return row.cells[grid.columns.index(column)]


@pytest.mark.parametrize("kind", ["max_probability", "entropy"])
def test_out_of_distribution_questions_are_positive(study, section, kind):
    inside, outside = (
        {result.seed: list(scores(result, kind)) for result in study.results("home", name) if result.method == "map"}
        for name in ("home", "other")
    )
    for title, oracle in (("AUROC ↑", auroc), ("FPR95 ↓", fpr95)):
        found = cell(section, f"out_of_distribution_{kind}", title, "map", "Other & more")
        assert found.values == pytest.approx([oracle(inside[seed], outside[seed]) for seed in range(5)], abs=1e-6)


@pytest.mark.parametrize("kind", ["max_probability", "entropy"])
def test_wrong_answers_are_positive(study, section, kind):
    expected = []
    for result in study.results("home", "judged"):
        if result.method == "isotropic":
            right = (result.log_probs.argmax(1) == result.target).tolist()
            pairs = list(zip(scores(result, kind), right, strict=True))
            expected.append(auroc([s for s, ok in pairs if ok], [s for s, ok in pairs if not ok]))
    found = cell(section, f"errors_{kind}", "AUROC ↑", "isotropic", "Judged")
    assert found.values == pytest.approx(expected, abs=1e-6)


def test_scores_of_a_posterior_have_tables_of_the_methods_that_have_them(study, section):
    grid = next(grid for grid in section.linked_grids if grid.name == "out_of_distribution_mutual_information")
    assert [row.key for row in grid.blocks[0].rows] == ["laplace_evidence", "laplace_lpo"]
    inside, outside = (
        {
            result.seed: result.uncertainty["mutual_information"].tolist()
            for result in study.results("home", name)
            if result.method == "laplace_lpo"
        }
        for name in ("home", "judged")
    )
    found = cell(section, grid.name, "AUROC ↑", "laplace_lpo", "Judged")
    assert found.values == pytest.approx([auroc(inside[seed], outside[seed]) for seed in range(5)], abs=1e-6)
    assert "by mutual information." in grid.caption


def test_the_report_shows_the_auroc_of_every_score(section):
    summary = section.grids[0]
    assert summary.name == "out_of_distribution"
    titles = ["1 - maximum probability", "entropy", "entropy over that of a uniform guess", "mutual information"]
    assert [block.title for block in summary.blocks] == titles
    single = next(grid for grid in section.linked_grids if grid.name == "out_of_distribution_entropy")
    assert summary.blocks[1].rows == single.blocks[0].rows


def test_the_entropy_relative_to_a_uniform_guess_does_not_depend_on_the_number_of_choices(study):
    result = study.results("home", "other")[0]
    uniform = torch.where(result.log_probs > -torch.inf, 0.0, result.log_probs).log_softmax(1)
    assert set((uniform > -torch.inf).sum(1).tolist()) == {4, 5}
    scores = detection.score_of(replace(result, log_probs=uniform), "relative_entropy")
    torch.testing.assert_close(scores, torch.ones(40, dtype=torch.float64))


def test_other_numbers_of_choices_are_told(section):
    text = "\n".join(section.text)
    assert "Questions of Other & more, Judged have another number of choices than those of Home" in text


def test_without_the_first_data_set_there_is_no_section(make_study, report_of):
    whole = make_study(seeds=(0,), lora={})
    rest = tuple(outcome for outcome in whole.outcomes if outcome.tested_on != "home")
    assert detection.section(report_of(type(whole)(**{**vars(whole), "outcomes": rest}))) is None


def test_alone_there_are_errors_only(make_study, report_of):
    section = detection.section(report_of(make_study(labels={"home": "Home"}, seeds=(0,), lora={})))
    assert [grid.name for grid in section.grids] == ["errors"]
    assert [grid.name for grid in section.linked_grids] == [
        "errors_max_probability",
        "errors_entropy",
        "errors_relative_entropy",
        "errors_mutual_information",
    ]


def test_seeds_without_scores_are_told(make_study, report_of):
    """A study that was resumed has predictions that were stored before there were scores."""
    whole = make_study(seeds=(0, 1, 2), lora={})
    told = "Not all seeds have all scores"
    assert not any(told in text for text in detection.section(report_of(whole)).text)
    outcomes = tuple(
        replace(
            outcome,
            results=tuple(
                replace(r, uncertainty={}) if (r.method, r.seed) == ("laplace_lpo", 1) else r for r in outcome.results
            ),
        )
        for outcome in whole.outcomes
    )
    section = detection.section(report_of(replace(whole, outcomes=outcomes)))
    [text] = [text for text in section.text if told in text]
    assert "mutual information of Bayesian-MoE (LPO), 2 of 3 seeds" in text
    assert "mutual information (errors) of Bayesian-MoE (LPO), 2 of 3 seeds" in text
    assert "evidence" not in text
    assert "entropy" not in text
