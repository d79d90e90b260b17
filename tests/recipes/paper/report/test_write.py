"""The files of a report."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from bmoe_lightning.metrics import METRICS
from bmoe_lightning.report import SummarySettings
from recipes.common import report_parts
from recipes.paper.report import Cost, Costs, Timing, warned, write, write_report
from recipes.paper.report.sections import SECTIONS

SETTINGS = SummarySettings(num_samples=50)
METHODS = {
    "map": ("MAP", 3.0),
    "laplace_evidence": ("Bayesian-MoE (evidence)", 1.6),
    "laplace_lpo": ("Bayesian-MoE (LPO)", 1.1),
    "laplace_lpo_without_1": ("Without layers 1", 2.4),
    "laplace_lpo_without_2": ("Without layers 2", 1.3),
}


@pytest.fixture
def few(monkeypatch):
    """Only the sections that are made quickly, and no figures."""
    quick = [
        make
        for make in SECTIONS
        if make.__module__.rpartition(".")[2] in ("in_distribution", "shift", "layers", "warned")
    ]
    monkeypatch.setattr(write, "SECTIONS", quick)
    monkeypatch.setattr(report_parts, "matplotlib_available", lambda: False)


@pytest.fixture(scope="module")
def small(make_study):
    return make_study(METHODS, seeds=(0, 1), labels={"home": "Home", "judged": "Judged"})


@pytest.fixture(scope="module")
def written(small, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    return folder, write_report(folder, small, settings=SETTINGS)


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_every_file_is_listed_and_written(written):
    folder, paths = written
    assert paths[0] == folder / "report.md"
    assert paths[-1] == folder / "results.json"
    assert {path.relative_to(folder).as_posix() for path in paths} == set(contents(folder))
    names = {path.name for path in paths}
    assert {
        "in_distribution.md",
        "in_distribution.tex",
        "shift.tex",
        "layers.png",
        "reliability_home_judged.png",
    } <= names


def test_the_same_study_gives_the_same_bytes(written, small, tmp_path):
    folder, _ = written
    write_report(tmp_path, small, settings=SETTINGS)
    assert contents(tmp_path) == contents(folder)


def test_the_report_names_what_it_was_made_with(few, small, tmp_path):
    versions, hashes = {"python": "3.0", "torch": "2.0"}, {"home-experts": {"data": {"test": "abc"}}}
    paths = write_report(tmp_path, replace(small, versions=versions, hashes=hashes), settings=SETTINGS)
    assert "Made with python 3.0, torch 2.0." in paths[0].read_text()
    found = json.loads(paths[-1].read_text())
    assert (found["versions"], found["hashes"]) == (versions, hashes)


def test_the_report_has_every_section_and_every_link_leads_somewhere(written):
    folder, _ = written
    text = (folder / "report.md").read_text()
    for title in ("In distribution", "Under distribution shift", "Is the difference real?", "Cost", "Reliability"):
        assert f"\n## {title}" in text
    links = [part.partition(")")[0] for part in text.split("](")[1:]]
    assert len(links) > 5
    assert all((folder / link).is_file() for link in links)


def test_the_numbers_are_in_json_unrounded_with_seeds_and_conventions(written):
    results = json.loads((written[0] / "results.json").read_text())
    table = next(table for table in results["tables"] if table["name"] == "in_distribution")
    cell = table["blocks"][2]["rows"][0]["cells"]["Home"]
    assert cell["n"] == 2
    assert cell["seeds"] == [0, 1]
    assert cell["mean"] == sum(cell["values"]) / 2
    assert results["ece_convention"].startswith("top-label confidence, 15 equal-width bins")
    assert results["bars"][0]["verdict"] in ("met", "missed", "not decided")
    everything = next(table for table in results["tables"] if table["name"] == "all_metrics_home_home")
    assert list(everything["blocks"][0]["rows"][0]["cells"]) == [metric.header for metric in METRICS]


def test_tables_that_a_later_report_lacks_are_removed_and_other_files_are_not(small, tmp_path, few):
    write_report(tmp_path, small, settings=SETTINGS)
    for name in ("tables/mine.md", "notes.md"):
        (tmp_path / name).write_text("mine")
    write_report(tmp_path, replace(small, tables=(3,), figures=()), settings=SETTINGS)
    assert not (tmp_path / "tables/in_distribution.md").exists()
    assert (tmp_path / "tables/shift.md").is_file()
    assert (tmp_path / "tables/mine.md").read_text() == (tmp_path / "notes.md").read_text() == "mine"


def test_without_matplotlib_the_figures_are_left_out_and_it_is_told(small, tmp_path, few):
    paths = write_report(tmp_path, small, settings=SETTINGS)
    assert not any(path.suffix == ".png" for path in paths)
    assert "matplotlib is not installed" in paths[0].read_text()


@pytest.mark.parametrize(("tables", "told"), [((1, 3, 5, 6), False), ((2,), True), ((6, 7), True)])
def test_that_both_numbers_of_a_pair_give_one_table_is_told(small, tmp_path, few, tables, told):
    text = write_report(tmp_path, replace(small, tables=tables), settings=SETTINGS)[0].read_text()
    assert ("both numbers of a pair give one table here" in text) is told


def test_costs_are_relative_to_the_reference(small, report_of):
    costs = {
        "map": Cost(None, Timing((2.0,), (2.0,)), Timing((0.25,), (0.25,)), None, 100.0, 100.0),
        # The second round is ten times slower for both.
        "laplace_lpo": Cost(
            Timing((30.0, 30.0), (2.0, 2.0)), Timing((7.0, 40.0, 7.0), (2.0, 20.0, 2.0)), None, 250.0, 150.0, 100.0, 2
        ),
        "bayesian_lora": Cost(predict=Timing((6.0,), (2.0,))),
    }
    section = cost_section(
        report_of(small, costs=Costs(costs, {"map": "On a machine.", "laplace_lpo": "On a machine."}, "Without one."))
    )
    rows = {row.key: [cell and cell.mean for cell in row.cells] for row in section.grids[0].blocks[0].rows}
    assert rows == {
        "map": [None, 1.0, None, 1.0, 1.0, 0],
        "bayesian_lora": [None, 3.0, None, None, None, 0],
        "laplace_lpo": [15.0, 3.5, 2.5, 1.5, None, 2],
    }
    assert (
        "predictions of MAP on the same questions with the same model (MAP: 2 s, 0 MiB, 250 ms a question)"
        in section.grids[0].caption
    )
    assert section.grids[0].caption.endswith(" On a machine.")
    label = section.grids[0].blocks[0].rows[-1].label
    wide = f"Times whose ratios differ by more than a quarter between rounds: {label}, prediction time 2.00 to 3.50."
    assert section.text == (wide, "Without one.")
    assert section.details["measured_costs"]["laplace_lpo"]["fit"]["seconds"] == (30.0, 30.0)


def cost_section(report):
    return next(make for make in SECTIONS if make.__module__.endswith(".costs"))(report)


def test_costs_that_were_not_measured_are_not_made_up(written, small, report_of):
    text = (written[0] / "report.md").read_text()
    assert "\n## Cost\n\nNot measured. Run the command that made the study again" in text
    assert cost_section(report_of(small, costs=Costs(left_out="Why."))).text == ("No costs. Why.",)


@pytest.mark.parametrize(("model", "begins"), [("the small model", "The small model"), ("my/model", "my/model")])
def test_captions_begin_with_a_capital_and_ids_stay_as_they_are(small, report_of, model, begins):
    study = replace(small, model=model)
    quick = {"in_distribution", "shift", "layers", "prior", "costs", "detection", "all_metrics"}
    makes = [make for make in SECTIONS if make.__module__.rpartition(".")[2] in quick]
    report = report_of(
        study,
        costs=Costs({"map": Cost(predict=Timing((2.0,), (2.0,)))}, {"map": "On a machine."}),
        settings=replace(SETTINGS, num_samples=10),
    )
    assert report.model == begins
    grids = [grid for make in makes if (section := make(report)) is not None for grid in section.all_grids]
    named = [grid.caption for grid in grids if model in grid.caption.replace(begins, model)]
    assert len(named) > 5
    assert all(caption.startswith(begins) for caption in named)


def test_warnings_of_results_are_told(small, tmp_path, few):
    first = small.outcomes[0]
    doubtful = tuple(replace(r, warnings=("it learned nothing",)) if r.method == "map" else r for r in first.results)
    study = replace(small, outcomes=(replace(first, results=doubtful), *small.outcomes[1:]))
    text = write_report(tmp_path, study, settings=SETTINGS)[0].read_text()
    assert "- it learned nothing\n    - trained on Home, seeds 0, 1: MAP\n" in text
    places = json.loads((tmp_path / "results.json").read_text())["warnings"]["it learned nothing"]
    assert places[1] == {"model": "trained on Home", "method": "MAP", "seed": 1, "tested_on": "home"}


def test_a_warning_of_all_methods_does_not_list_them(small, report_of):
    outcomes = tuple(
        replace(outcome, results=tuple(replace(result, warnings=("doubtful",)) for result in outcome.results))
        for outcome in small.outcomes
    )
    (text,) = warned.section(report_of(replace(small, outcomes=outcomes))).text
    assert text.splitlines() == [
        "- doubtful",
        "    - trained on Home, seeds 0, 1: all methods",
        "    - trained on Judged, seeds 0, 1: all methods",
        "    - trained on Home (LoRA), seeds 0, 1: all methods",
        "    - trained on Judged (LoRA), seeds 0, 1: all methods",
    ]


def test_warnings_that_differ_in_numbers_alone_are_told_once(small, report_of):
    def doubtful(result):
        words = f"the precision is 1e+0{result.seed} (layer {result.seed}): add {result.seed}.5 labels"
        return replace(result, warnings=(words, "another") if result.method == "map" else ())

    first = small.outcomes[0]
    study = replace(small, outcomes=(replace(first, results=tuple(map(doubtful, first.results))),))
    found = warned.section(report_of(study))
    assert found.text[0].splitlines() == [
        "- the precision is 1e+00 (layer 0): add 0.5 labels (the numbers are those of the first)",
        "    - trained on Home, seeds 0, 1: MAP",
        "- another",
        "    - trained on Home, seeds 0, 1: MAP",
    ]
    assert len(found.details["warnings"]) == 3


def test_a_study_without_outcomes_is_refused(small, tmp_path):
    with pytest.raises(ValueError, match="no outcomes to report; run it first"):
        write_report(tmp_path / "report", replace(small, outcomes=()))
    assert not (tmp_path / "report").exists()
