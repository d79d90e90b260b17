"""The tables of the study."""

from __future__ import annotations

from study_cases import case

from recipes.calibration_study.cases import CALIBRATED
from recipes.calibration_study.report import split_tables, temperature_table, temperature_tables
from recipes.calibration_study.split_sizes import SplitRegret
from recipes.calibration_study.temperatures import Regret


def test_temperatures_have_mean_and_worst_case():
    one, two = case(), case(seed=1)
    regrets = [Regret(one, "no prior", 10, 1.0), Regret(two, "no prior", 10, 2000.0), Regret(one, "no prior", 25, -0.2)]
    table = temperature_table(regrets)
    assert table.splitlines()[0] == "| regret with n labels | 10 | 25 |"
    assert "| no prior | 1 000 (2 000) | 0 (0) |" in table
    assert table.endswith("2 fine-tunings (built-in, normal: 2).")


def test_each_group_of_cases_has_a_table():
    regrets = [
        SplitRegret("built-in", "normal", 0, "a", 32, -3.0),
        SplitRegret("built-in", "normal", 1, "a", 32, 5.0),
        SplitRegret("built-in", "normal", 0, "a", None, None),
        SplitRegret("openbookqa", "normal", 0, "a", 32, 7.0),
    ]
    table = split_tables(regrets, {"a": "A"})
    assert "| regret on built-in task, normal fine-tunings | 32 | all |" in table
    assert "| A | 1 (5) | refused |" in table
    assert "| regret on real questions | 32 |" in table
    assert "other fine-tunings" not in table


def test_models_that_are_calibrated_already_have_tables_of_their_own():
    made = case(kind=CALIBRATED)
    regrets = [Regret(case(), "no prior", 10, 1.0), Regret(made, "no prior", 10, 30.0)]
    first, second = temperature_tables(regrets).split("\n\n| ")
    assert "| no prior | 1 (1) |" in first
    assert second.startswith("regret with n labels, calibrated already | 10 |")
    assert "| no prior | 30 (30) |" in second
    splits = [
        SplitRegret("built-in", "memorises", 0, "a", 32, 1.0),
        SplitRegret("built-in", CALIBRATED, 0, "a", 32, 9.0),
    ]
    others, calibrated = split_tables(splits, {"a": "A"}).split("\n\n| ")
    assert "| A | 1 (1) |" in others
    assert calibrated.startswith("regret on models that are calibrated already | 32 |")
    assert "| A | 9 (9) |" in calibrated
