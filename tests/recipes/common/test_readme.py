"""The README's numbers come from a run."""

from __future__ import annotations

import io
import re

import pytest

from recipes.common.readme import README, RESULTS_PAGE, ROOT, between, budget_table, in_short, main, models, scores


def test_places_are_replaced_and_nothing_else():
    text = "a\n<!-- x -->\nold\n<!-- end of x -->\nb\n"
    assert between(text, "x", "new") == "a\n<!-- x -->\n\nnew\n\n<!-- end of x -->\nb\n"
    assert between(between(text, "x", "new"), "x", "new") == between(text, "x", "new")


def test_a_missing_place_is_refused():
    with pytest.raises(ValueError, match="marked `<!-- x -->`, found 0"):
        between("nothing", "x", "new")


def test_scores_leave_out_fitted_numbers_and_bold():
    results = "| a |\n|---|\n| **1** |\n\n| fitted |\n|---|\n| 2 |\n\n12 items. Bold: best mean.\n\nA note.\n"
    assert scores(results) == "| a |\n|---|\n| 1 |\n\n12 items."


def test_the_short_form_leaves_out_the_intervals():
    table = "| MAP | 0.7 ± 0.1 [0.6, 0.8] | 1.1 [-0.9, 1.3] |\n\nBins (lo, hi]. In brackets: 95 %, 9 draws. ±: seeds."
    assert in_short(table) == "| MAP | 0.7 ± 0.1 | 1.1 |\n\nBins (lo, hi]. ±: seeds."


def test_the_caption_names_the_pre_trained_weights(tmp_path):
    results = tmp_path / "results.json"
    results.write_text('{"config": {"pretrained_weights": {"0": "abc", "1": "def"}}}')
    assert models(tmp_path) == " Pre-trained weights of the seeds: abc, def."
    results.write_text('{"config": {"pretrained_weights": {"0": ""}}}')
    assert models(tmp_path) == ""


def test_budget_table():
    points = [
        {"label": "one", "num_labels": 0, "median": 1.23456},
        {"label": "one", "num_labels": None, "median": 0.5},
    ]
    assert budget_table(points).splitlines()[0] == "| NLL ↓ with n labels | 0 | all |"
    assert budget_table(points).splitlines()[2] == "| one | 1.235 | 0.500 |"


def test_without_a_run_nothing_is_touched(tmp_path, capsys):
    before = (ROOT / "README.md").read_bytes()
    assert main(["--output-dir", str(tmp_path)]) == 1
    assert "no finished run" in capsys.readouterr().err
    assert (ROOT / "README.md").read_bytes() == before


def test_the_pages_have_their_places():
    for page, name in ((README, "results"), (RESULTS_PAGE, "results"), (RESULTS_PAGE, "label budget")):
        between(page.read_text(encoding="utf-8"), name, "")


def test_readme_and_page_have_the_same_numbers():
    tables = [
        re.search(r"<!-- results -->\n(.*?)<!-- end of results -->", page.read_text("utf-8"), re.DOTALL)[1]
        for page in (README, RESULTS_PAGE)
    ]
    assert tables[0] == in_short(tables[1])


def test_a_command_s_output_goes_to_a_page(tmp_path, monkeypatch, capsys):
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- x -->\nold\n<!-- end of x -->\nb\n")
    arguments = ["--page", str(page), "--place", "x"]
    monkeypatch.setattr("sys.stdin", io.StringIO("new\n"))
    assert main(arguments) == 0
    filled = page.read_text()
    assert filled == "a\n<!-- x -->\n\nnew\n\n<!-- end of x -->\nb\n"
    # A command that failed has printed nothing.
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    assert main(arguments) == 1
    assert main(["--page", str(page)]) == 2
    assert page.read_text() == filled
    assert "nothing to put at 'x'" in capsys.readouterr().err
