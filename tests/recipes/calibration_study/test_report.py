"""The tables of the study."""

from __future__ import annotations

from study_cases import case

from recipes.calibration_study.report import split_tables, temperature_table
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
