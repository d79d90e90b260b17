"""Options of every method: plain values, documented, and cheaper in a trial."""

from __future__ import annotations

import json
from dataclasses import fields, make_dataclass, replace

import pytest
import torch
from methods_cases import RANK3

from bmoe_lightning.methods import MAP, LaplaceLPO, get_method, method_names
from bmoe_lightning.methods.base import CurvatureMethod, check_method_names
from bmoe_lightning.methods.options import option_columns, option_table, trial_options


def _size(value: float | tuple[float, ...]) -> float:
    return len(value) if isinstance(value, tuple) else value


@pytest.mark.parametrize("name", method_names())
class TestEveryMethod:
    def test_options_are_plain_values(self, name):
        method = get_method(name).with_defaults(RANK3)
        assert json.loads(json.dumps(method.fit_options())) == method.fit_options()
        assert json.loads(json.dumps(method.options())) == method.options()

    def test_options_are_documented(self, name):
        rows = option_table(type(get_method(name)))
        assert [row[0] for row in rows[:2]] == ["name", "label"]
        assert all(help_text.endswith(".") for _, _, help_text in rows[2:])

    def test_options_of_a_trial_are_valid_and_ask_for_less(self, name):
        method = get_method(name)
        chosen = trial_options(type(method))
        trial = replace(method, **chosen)
        assert all(_size(getattr(trial, option)) < _size(getattr(method, option)) for option in chosen)
        assert trial.needs.calibration_inputs <= 1
        assert trial.needs.runs <= 1

    def test_a_trial_repeats_nothing_more_than_twice(self, name):
        method = get_method(name)
        trial = replace(method, **trial_options(type(method)))
        repeated = {entry.name for entry in fields(trial)} & {"size", "epochs", "scales", "rates"}
        if not isinstance(method, CurvatureMethod) or method.needs.routers:  # else samples of logits, in no pass
            repeated |= {entry.name for entry in fields(trial)} & {"num_samples"}
        assert all(_size(getattr(trial, option)) <= 2 for option in repeated)


def test_columns_have_the_options_of_the_curvature_by_their_names():
    found = option_columns(LaplaceLPO(curvature=RANK3, link="probit"))
    assert found["link"] == "probit"
    assert found["rank"] == 3
    assert "label" not in found
    assert "rank" not in option_columns(LaplaceLPO())


def test_an_option_that_no_file_can_hold_is_refused():
    typed = make_dataclass("Typed", [("dtype", torch.dtype, torch.float32)], bases=(MAP,), frozen=True)
    with pytest.raises(TypeError, match="float32"):
        check_method_names([typed()])
