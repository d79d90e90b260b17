"""The tables of the paper's layout, recomputed with plain Python from the stored log-probabilities."""

from __future__ import annotations

import math
import statistics

import pytest

from recipes.paper.report import in_distribution, layers, prior, shift
from recipes.paper.report.published import Published
from recipes.paper.report.sections import SECTIONS


def nll(result):
    rows = zip(result.log_probs.tolist(), result.target.tolist(), strict=True)
    return -statistics.fmean(row[label] for row, label in rows)


def accuracy(result):
    rows = zip(result.log_probs.tolist(), result.target.tolist(), strict=True)
    return statistics.fmean(row.index(max(row)) == label for row, label in rows)


def ece(result):
    bins = {}
    for row, label in zip(result.log_probs.tolist(), result.target.tolist(), strict=True):
        confidence = math.exp(max(row))
        bins.setdefault(math.ceil(confidence * 15), []).append((confidence, row.index(max(row)) == label))
    gaps = [abs(sum(c - right for c, right in members)) for members in bins.values()]
    return sum(gaps) / len(result.target)


ORACLES = {"ACC (%) ↑": accuracy, "ECE (%) ↓": ece, "NLL ↓": nll}


def cells(grid):
    """Cells by block, row and column."""
    return {
        (block.title, row.key, column): cell
        for block in grid.blocks
        for row in block.rows
        for column, cell in zip(grid.columns, row.cells, strict=True)
    }


def of(study, trained, tested, method, mode="experts"):
    return [result for result in study.results(trained, tested, mode) if result.method == method]


class TestInDistribution:
    def test_every_number_of_every_method(self, study, report):
        (grid,) = in_distribution.section(report).grids
        found = cells(grid)
        for title, oracle in ORACLES.items():
            for name, label in study.labels.items():
                for method in ("map", "temperature", "laplace_lpo"):
                    values = [oracle(result) for result in of(study, name, name, method)]
                    cell = found[title, method, label]
                    assert cell.values == pytest.approx(values, abs=1e-12)
                    assert cell.mean == pytest.approx(statistics.fmean(values))
                    assert cell.std == pytest.approx(statistics.stdev(values))
                    assert cell.seeds == (0, 1, 2, 3, 4)

    def test_lora_runs_stand_among_the_others_under_names_of_their_own(self, study, report):
        (grid,) = in_distribution.section(report).grids
        labels = {row.key: row.label for row in grid.blocks[0].rows}
        assert labels["map_lora"] == "MAP (LoRA)"
        assert labels["bayesian_lora"] == "Bayesian-LoRA"
        assert list(labels)[:4] == ["map", "temperature", "map_lora", "bayesian_lora"]
        values = [nll(result) for result in of(study, "home", "home", "map", "lora")]
        assert cells(grid)["NLL ↓", "map_lora", "Home"].mean == pytest.approx(statistics.fmean(values))

    def test_rows_without_a_quarter_of_the_layers_are_in_their_own_table_alone(self, report):
        (grid,) = in_distribution.section(report).grids
        assert not any("without" in row.key for row in grid.blocks[0].rows)

    def test_the_caption_has_items_and_seeds(self, report):
        (grid,) = in_distribution.section(report).grids
        assert "Test items: Home 60, Other & more 40, Judged 50. 5 seeds" in grid.caption

    def test_a_missing_run_leaves_the_table_out(self, make_study, report_of):
        study = make_study(labels={"home": "Home", "judged": "Judged"}, seeds=(0,))
        study.labels["other"] = "Other"
        found = in_distribution.section(report_of(study))
        assert not found.grids
        assert found.text == ("Left out, since the study has no models trained on Other and tested on Other.",)

    def test_a_method_that_one_data_set_lacks_has_an_empty_cell(self, make_study, report_of):
        whole = make_study(seeds=(0,))
        first = whole.outcomes[0]
        fewer = type(first)("home", "experts", "home", tuple(r for r in first.results if r.method != "isotropic"))
        study = type(whole)(**{**vars(whole), "outcomes": (fewer, *whole.outcomes[1:])})
        (grid,) = in_distribution.section(report_of(study)).grids
        assert cells(grid)["NLL ↓", "isotropic", "Home"] is None
        assert cells(grid)["NLL ↓", "isotropic", "Judged"].std is None

    def test_seeds_that_differ_are_told(self, make_study, report_of):
        whole = make_study(seeds=(0, 1))
        first = whole.outcomes[0]
        fewer = type(first)("home", "experts", "home", tuple(result for result in first.results if result.seed == 0))
        study = type(whole)(**{**vars(whole), "outcomes": (fewer, *whole.outcomes[1:])})
        (grid,) = in_distribution.section(report_of(study)).grids
        assert "The seeds are not the same for every number" in grid.caption

    def test_published_rows_are_shown_for_their_preset_and_not_compared(self, study, report_of):
        entry = {
            "table": "in_distribution",
            "metric": "nll",
            "label": "MAP",
            "data": "judged",
            "mean": 0.01,
            "std": 0.1,
        }
        (grid,) = in_distribution.section(report_of(study, published=Published({"small": [entry]}))).grids
        row = grid.blocks[2].rows[-1]
        assert (row.label, row.is_ranked) == ("MAP (published)", False)
        assert [cell and cell.mean for cell in row.cells] == [None, None, 0.01]
        (grid,) = in_distribution.section(report_of(study, published=Published({"qwen": [entry]}))).grids
        assert all(row.is_ranked for row in grid.blocks[2].rows)


class TestShift:
    def test_models_of_the_first_data_set_on_all_others(self, study, report):
        (grid,) = shift.section(report).grids
        assert grid.columns == ("Other & more", "Judged")
        values = [nll(result) for result in of(study, "home", "judged", "isotropic")]
        assert cells(grid)["NLL ↓", "isotropic", "Judged"].values == pytest.approx(values, abs=1e-12)

    def test_one_data_set_has_no_others(self, make_study, report_of):
        found = shift.section(report_of(make_study(labels={"home": "Home"}, seeds=(0,))))
        assert found.text == ("Left out, since the study has no other data set than that of the training.",)


class TestLayers:
    def test_changes_are_relative_to_all_layers_in_each_seed(self, study, report):
        (grid,) = layers.section(report).grids
        found = cells(grid)
        whole, without = (of(study, "judged", "judged", f"laplace_lpo{end}") for end in ("", "_without_2"))
        for title, change, oracle in (("NLL ↓", "NLL change (%)", nll), ("ECE (%) ↓", "ECE change (%)", ece)):
            values = [oracle(one) / oracle(all_layers) - 1 for one, all_layers in zip(without, whole, strict=True)]
            assert found["Judged", "laplace_lpo_without_2", change].values == pytest.approx(values, rel=1e-9)
            assert found["Judged", "laplace_lpo", change] is None
            own = [oracle(result) for result in without]
            assert found["Judged", "laplace_lpo_without_2", title].values == pytest.approx(own, abs=1e-12)

    def test_the_figure_has_a_line_a_data_set_and_a_panel_a_metric(self, report):
        (named,) = layers.section(report).figures
        figure = named.draw()
        panels = figure.get_axes()
        assert [ax.get_ylabel() for ax in panels] == ["change of NLL (%)", "change of ECE (%)"]
        assert all(len(ax.containers) == 3 for ax in panels)
        line = panels[0].containers[0].lines[0]
        (grid,) = layers.section(report).grids
        expected = [100 * cells(grid)["Home", f"laplace_lpo_without_{n}", "NLL change (%)"].mean for n in (1, 2, 3, 4)]
        assert list(line.get_xdata()) == [1, 2, 3, 4]
        assert list(line.get_ydata()) == pytest.approx(expected)

    def test_the_table_and_the_figure_are_asked_for_separately(self, make_study, report_of):
        found = layers.section(report_of(make_study(seeds=(0,), tables=(), figures=(1,))))
        assert (len(found.grids), len(found.figures)) == (0, 1)
        found = layers.section(report_of(make_study(seeds=(0,), tables=(5,), figures=())))
        assert (len(found.grids), len(found.figures)) == (1, 0)

    def test_without_such_results_it_is_left_out(self, make_study, report_of):
        found = layers.section(report_of(make_study(methods={"map": ("MAP", 2.0)}, seeds=(0,))))
        assert found.text == ("Left out, since the study has no results without a part of the layers.",)


class TestPrior:
    def test_two_rows(self, study, report):
        (grid,) = prior.section(report).grids
        assert [row.label for row in grid.blocks[0].rows] == ["LA", "LA + LPO"]
        values = [nll(result) for result in of(study, "home", "home", "laplace_evidence")]
        assert cells(grid)["NLL ↓", "laplace_evidence", "Home"].values == pytest.approx(values, abs=1e-12)

    def test_one_of_them_is_no_table(self, make_study, report_of):
        found = prior.section(report_of(make_study(methods={"laplace_lpo": ("LPO", 1.1)}, seeds=(0,))))
        assert found.text[0].startswith("Left out, since the study has no results of LA on Home; LA on")


def test_only_what_was_asked_for_is_made(make_study, report_of):
    report = report_of(make_study(seeds=(0,), tables=(3,), figures=()))
    made = [make.__module__.rpartition(".")[2] for make in SECTIONS if make(report) is not None]
    assert "shift" in made
    assert not {"in_distribution", "layers", "prior"} & set(made)
