"""The demonstration teaches what it is there to teach."""

from __future__ import annotations

import json

import pytest

from recipes.qwen_obqa.__main__ import main


@pytest.mark.slow
def test_the_posterior_calibrates_an_over_confident_model(tmp_path):
    folder = tmp_path / "run"
    # Neither the seeds that the README reports nor those on which the settings were chosen.
    arguments = ["--quiet", "--output-dir", str(folder), "--first-seed", "200", "--accelerator", "cpu"]
    assert main([*arguments, "--methods", "map,mc_dropout,temperature,laplace_lpo,evidence_temperature"]) == 0
    rows = {row["method"]: row for row in json.loads((folder / "results.json").read_text())["rows"]}
    plain, laplace, temperature = rows["map"], rows["laplace_lpo"], rows["temperature"]
    assert plain["acc"]["mean"] > 0.5
    assert plain["ece"]["mean"] > 0.15
    # One seed on one machine: the bounds leave room beside the figures of three seeds.
    assert laplace["ece"]["mean"] < 0.6 * plain["ece"]["mean"]
    assert laplace["nll"]["mean"] < 0.75 * plain["nll"]["mean"]
    assert abs(laplace["acc"]["mean"] - plain["acc"]["mean"]) < 0.03
    assert laplace["nll"]["mean"] < rows["mc_dropout"]["nll"]["mean"]
    assert rows["evidence_temperature"]["nll"]["mean"] < 1.15 * temperature["nll"]["mean"]
