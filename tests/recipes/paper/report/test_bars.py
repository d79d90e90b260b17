"""Claims: met, missed or not decided."""

from __future__ import annotations

import re
import statistics
from dataclasses import replace

import pytest
import torch

from bmoe_lightning.metrics import negative_log_likelihood
from bmoe_lightning.report import Difference
from recipes.paper.report import bars
from recipes.paper.report.bars import Comparison, compare, joint_verdicts, verdict
from recipes.paper.report.compared import Bar, read_compared

METHODS = {
    "map": ("MAP", 3.0),
    "temperature": ("Temperature scaling", 1.0),
    "evidence_temperature": ("Evidence temperature", 1.02),
    "laplace_lpo": ("Bayesian-MoE (LPO)", 1.1),
}
BAR = Bar("A title", "lower", "laplace_lpo", ("map",), "in_distribution")
LABELS = ("One", "Two")


def found(low, high):
    return Difference("one", "two", "nll", False, (low + high) / 2, low, high, 0.95, (0,), (10,))


@pytest.mark.parametrize(
    ("claim", "margin", "interval", "expected"),
    [
        ("lower", 0.0, (-0.2, -0.1), "met"),
        ("lower", 0.0, (-0.2, 0.1), "not decided"),
        ("lower", 0.0, (0.1, 0.2), "missed"),
        ("lower", 0.03, (-0.1, 0.02), "met"),
        ("lower", 0.03, (0.01, 0.05), "not decided"),
        ("lower", 0.03, (0.04, 0.05), "missed"),
        ("lower", 0.0, (0.0, 0.0), "not decided"),
        ("higher", 0.0, (0.1, 0.2), "met"),
        ("higher", 0.0, (-0.2, -0.1), "missed"),
        ("higher", 0.0, (-0.2, 0.1), "not decided"),
        ("none", 0.0, (-0.2, -0.1), "One is better"),
        ("none", 0.0, (0.1, 0.2), "Two is better"),
        ("none", 0.0, (-0.1, 0.2), "not decided"),
        ("lower", 0.0, (float("nan"), float("nan")), "not decided"),
    ],
)
def test_verdicts(claim, margin, interval, expected):
    assert verdict(replace(BAR, claim=claim, margin=margin), found(*interval), LABELS) == expected


def test_the_better_one_of_a_metric_that_should_be_high():
    assert verdict(replace(BAR, claim="none", metric="acc"), found(0.1, 0.2), LABELS) == "One is better"


def test_the_difference_is_a_mean_over_data_sets(study, report):
    comparison = compare(report, BAR, "map")
    expected = []
    for name in study.labels:
        results = study.results(name, name)
        nlls = {
            method: statistics.fmean(
                float(negative_log_likelihood(r.log_probs, r.target)) for r in results if r.method == method
            )
            for method in ("laplace_lpo", "map")
        }
        expected.append(nlls["laplace_lpo"] - nlls["map"])
        assert comparison.by_set[name].estimate == pytest.approx(expected[-1], abs=1e-12)
    assert comparison.overall.estimate == pytest.approx(statistics.fmean(expected), abs=1e-12)
    assert comparison.overall.seeds == (0, 1, 2, 3, 4)
    assert comparison.overall.num_examples == (60, 40, 50)


def test_under_shift_the_models_are_those_of_the_first_data_set(study, report):
    comparison = compare(report, replace(BAR, data="shift"), "map")
    assert comparison.data == ("other", "judged")
    expected = statistics.fmean(
        (1 if r.method == "laplace_lpo" else -1) * float(negative_log_likelihood(r.log_probs, r.target))
        for r in study.results("home", "judged")
        if r.method in ("laplace_lpo", "map")
    )
    assert comparison.by_set["judged"].estimate == pytest.approx(2 * expected, abs=1e-12)


def test_a_lora_run_is_compared_by_seed(report):
    assert compare(report, BAR, "bayesian_lora").overall.seeds == (0, 1, 2, 3, 4)


def test_data_sets_that_lack_a_method_are_told(make_study, report_of):
    whole = make_study(seeds=(0, 1), lora={})
    first = whole.outcomes[0]
    fewer = type(first)("home", "experts", "home", tuple(r for r in first.results if r.method != "isotropic"))
    report = report_of(type(whole)(**{**vars(whole), "outcomes": (fewer, *whole.outcomes[1:])}))
    comparison = compare(report, BAR, "isotropic")
    assert (comparison.data, comparison.lacking) == (("other", "judged"), ("home",))
    text = "\n".join(bars.section(report).text)
    assert "2 of 3 data sets, in distribution" in text
    assert "no results of both laplace_lpo and bayesian_lora (in distribution)" in text


def test_the_section_says_what_is_met(report):
    section = bars.section(report)
    (table, joint, by_set, how, lacking) = section.text
    line = next(line for line in table.splitlines() if "less MAP |" in line)
    assert line.startswith("| Ahead of the baselines | NLL, Bayesian-MoE (LPO) less MAP | 3 of 3 data sets")
    assert line.endswith("| met |")
    assert "By data set" in by_set
    assert "pre-training" in how
    assert "not corrected for their number" in how
    # No study of two checkpoints, so that not all baselines are there.
    assert "| Ahead of the baselines | 2 of 5 | not decided |" in joint
    assert "deep_ensemble" in lacking
    details = section.details["bars"]
    assert details[0]["verdict"] == "met"
    assert details[0]["overall"]["high"] < 0
    assert section.details["joint"][0]["verdict"] == "not decided"


@pytest.mark.parametrize(
    ("intervals", "expected"),
    [
        ([(-0.2, -0.1), (-0.3, -0.1)], "met"),
        ([(-0.2, -0.1), (-0.3, 0.1)], "not decided"),
        ([(-0.2, -0.1), (0.1, 0.3)], "missed"),
        ([(-0.2, 0.1), (0.1, 0.3)], "missed"),
        ([(-0.2, -0.1)], "not decided"),
        ([(0.1, 0.2)], "missed"),
    ],
)
def test_a_claim_about_several_methods_has_one_verdict(intervals, expected):
    bar = replace(BAR, others=("map", "mc_dropout"))
    comparisons = [Comparison(bar, LABELS, found(*interval), {}, ("home",), ()) for interval in intervals]
    single = Comparison(BAR, LABELS, found(0.1, 0.2), {}, ("home",), ())
    [joint] = joint_verdicts([*comparisons, single])
    assert (joint.title, joint.compared, joint.total, joint.verdict) == ("A title", len(intervals), 2, expected)
    unclaimed = [replace(comparison, bar=replace(bar, claim="none")) for comparison in comparisons]
    assert joint_verdicts(unclaimed) == []


def test_two_equal_methods_meet_every_claim_of_not_being_behind(make_study, report_of):
    """At a margin of zero they could not."""
    whole = make_study(seeds=(0, 1), lora={})
    outcomes = tuple(
        replace(
            outcome,
            results=(
                *outcome.results,
                *(replace(r, method="twin", label="Twin") for r in outcome.results if r.method == "map"),
            ),
        )
        for outcome in whole.outcomes
    )
    report = report_of(replace(whole, outcomes=outcomes))
    claims = [bar for bar in read_compared().bars if re.search("behind|within", bar.title)]
    assert len(claims) == 2
    for bar in claims:
        assert bar.relative
        assert f"{100 * bar.margin:g} %" in bar.title
        assert compare(report, replace(bar, method="twin"), "map").verdict == "met"


@pytest.mark.filterwarnings("ignore:.*target probability zero")
def test_an_infinite_loss_is_told_in_the_report(make_study, report_of):
    whole = make_study(seeds=(0, 1), lora={})
    result = next(r for r in whole.outcomes[0].results if r.method == "map")
    result.log_probs[0] = torch.where(
        torch.arange(result.log_probs.shape[1]) == result.target[0], -torch.inf, result.log_probs[0]
    ).log_softmax(0)
    section = bars.section(report_of(whole))
    line = next(line for line in section.text[0].splitlines() if "less MAP |" in line)
    assert line.endswith("| not finite | no interval | not decided |")


def guessing(result):
    """A result on questions with two choices of which every other answer is wrong."""
    top = (result.target + torch.arange(len(result.target))) % 2
    ordered = result.log_probs.sort(1, descending=True).values
    return replace(result, log_probs=torch.where(top[:, None] == 0, ordered, ordered.flip(1)))


def test_data_sets_that_are_answered_by_chance_are_marked_and_named(make_study, report_of):
    whole = make_study(METHODS, seeds=(0, 1, 2), lora={})

    def changed(outcome, seeds):
        return replace(outcome, results=tuple(guessing(r) if r.seed in seeds else r for r in outcome.results))

    outcomes = [
        changed(o, (1, 2) if (o.trained_on, o.tested_on) == ("judged", "judged") else ()) for o in whole.outcomes
    ]
    section = bars.section(report_of(replace(whole, outcomes=tuple(outcomes))))
    assert section.details["guessed"] == [
        {"data": "in_distribution", "tested_on": "judged", "seeds": (1, 2), "total": 3}
    ]
    lines = next(text for text in section.text if text.startswith("By data set")).splitlines()[4:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert {line[1] for line in cells} == {"in distribution", "shift"}
    for line in cells:
        assert [cell.endswith("†") for cell in line[2:]] == [False, False, line[1] == "in distribution"]
    (note,) = [text for text in section.text if text.startswith("†")]
    assert "MAP is not better than chance" in note
    assert "Judged, in distribution (2 of 3 seeds)." in note


def test_where_every_data_set_is_learned_nothing_is_marked(make_study, report_of):
    section = bars.section(report_of(make_study(METHODS, seeds=(0, 1, 2), lora={})))
    assert section.details["guessed"] == []
    assert not any("†" in text for text in section.text)


def test_one_seed_is_told(make_study, report_of):
    section = bars.section(report_of(make_study(seeds=(3,), lora={})))
    assert any("With one seed the interval does not have the spread over trainings." in text for text in section.text)


@pytest.mark.parametrize(("number", "parts"), [(0, 4), (2, 2), (3, 3), (4, 4)])
def test_a_claim_about_parts_of_the_layers_is_about_those_that_there_are(number, parts):
    compared = read_compared()
    found = compared.bars_of_parts(number)
    (claim,) = [bar for bar in found if bar.method == "laplace_lpo_without_1"]
    assert claim.title == f"The first of {parts} parts of the layers matters most"
    assert claim.others == tuple(f"laplace_lpo_without_{other}" for other in range(2, parts + 1))
    assert [bar for bar in found if bar != claim] == [bar for bar in compared.bars if bar.method != claim.method]


def test_a_model_of_two_layers_has_a_verdict_on_its_parts(make_study, report_of):
    whole = make_study(seeds=(0, 1), lora={})
    outcomes = [
        replace(entry, results=tuple(r for r in entry.results if not re.search("without_[34]", r.method)))
        for entry in whole.outcomes
    ]
    section = bars.section(report_of(replace(whole, outcomes=tuple(outcomes))))
    assert "| The first of 2 parts of the layers matters most |" in section.text[0]
    assert "without_3" not in " ".join(section.text)


def test_the_file_of_claims_is_read_and_unknown_choices_are_refused(tmp_path):
    compared = read_compared()
    assert compared.without_part("laplace_lpo_without_3") == 3
    assert compared.without_part("laplace_lpo") is None
    assert {bar.metric for bar in compared.bars} == {"nll"}
    with pytest.raises(ValueError, match="claim of the bar 'A title' is 'lowest'"):
        replace(BAR, claim="lowest")
    with pytest.raises(ValueError, match="data of the bar 'A title' is 'all'"):
        replace(BAR, data="all")
    with pytest.raises(ValueError, match="no metric 'wer'"):
        replace(BAR, metric="wer")
    assert replace(BAR, claim="lower", metric="set_coverage_lac").claim == "lower"
    with pytest.raises(ValueError, match="but neither higher nor lower values are better"):
        replace(BAR, claim="none", metric="set_coverage_lac")
