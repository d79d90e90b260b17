"""The README's numbers come from a run."""

from __future__ import annotations

import pytest

from recipes.common.readme import ROOT, between, budget_table, main, scores


def test_places_are_replaced_and_nothing_else():
    text = "a\n<!-- x -->\nold\n<!-- end of x -->\nb\n"
    assert between(text, "x", "new") == "a\n<!-- x -->\n\nnew\n\n<!-- end of x -->\nb\n"
    assert between(between(text, "x", "new"), "x", "new") == between(text, "x", "new")


def test_a_missing_place_is_refused():
    with pytest.raises(ValueError, match="marked 'x'"):
        between("nothing", "x", "new")


def test_scores_leave_out_fitted_numbers_and_bold():
    results = "| a |\n|---|\n| **1** |\n\n| fitted |\n|---|\n| 2 |\n\n12 items. Bold: best mean.\n"
    assert scores(results) == "| a |\n|---|\n| 1 |\n\n12 items."


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


def test_the_readme_has_its_places():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in ("results", "label budget"):
        between(text, name, "")
