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
    assert plain["ece"]["mean"] > 0.1, "the model that methods start from is over-confident"
    # How much depends on the pre-trained model, which differs between machines. Temperature scaling tells what there
    # is to win: the posterior, fitted on the same labels, wins as much.
    assert laplace["nll"]["mean"] < 1.05 * temperature["nll"]["mean"]
    assert laplace["nll"]["mean"] < rows["mc_dropout"]["nll"]["mean"] < plain["nll"]["mean"]
    assert laplace["ece"]["mean"] < plain["ece"]["mean"]
    assert abs(laplace["acc"]["mean"] - plain["acc"]["mean"]) < 0.03
    # Without labels it may be too large, by how much differs between machines too: it was 1.30 x on one of them.
    assert rows["evidence_temperature"]["nll"]["mean"] < plain["nll"]["mean"]
