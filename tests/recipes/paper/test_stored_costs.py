"""The file of measured costs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bmoe_lightning.methods import FitResult, Predictions, get_method
from recipes.paper.report import Cost, Timing
from recipes.paper.stored_costs import COSTS_FILE, Conditions, StoredCost, StoredCosts, read_costs, write_costs
from recipes.qwen_obqa.stored_predictions import StoredPredictions, origin_of_predictions

CONDITIONS = Conditions("host", "the CPU (1 threads)", 0, 64, 32, 8, 4, batch_size=16, eval_batch_size=8)
METHOD = get_method("map")


def predicted(folder, run="run", questions="questions"):
    logits = torch.zeros(2, 3, dtype=torch.float64)
    predictions = Predictions(logits.log_softmax(1), torch.tensor([0, 1]), logits)
    StoredPredictions(folder, run, questions).write(METHOD, FitResult(fit_id="fit"), predictions)
    return f"{folder.name}/map.safetensors"


@pytest.fixture
def entry(tmp_path):
    path = predicted(tmp_path / "predictions")
    cost = Cost(None, Timing((2.0, 3.0), (1.0, 1.0)), None, 300.0, further_runs=2)
    return StoredCost("lora", "map", path, origin_of_predictions(tmp_path / path), CONDITIONS, cost)


def test_costs_are_read_as_they_were_written(tmp_path, entry):
    write_costs(tmp_path, [entry], "something is missing")
    found = read_costs(tmp_path)
    assert found == StoredCosts((entry,), "something is missing")
    shown = found.shown()
    assert shown.rows == {"map_lora": entry.cost}
    assert shown.left_out == "something is missing"
    assert (
        "64 training questions in batches of 16 and 32 calibration questions in batches of 8"
        in shown.measured_on["map_lora"]
    )
    assert "8 test questions in batches of 8 and of 4 questions alone" in shown.measured_on["map_lora"]


def test_a_study_without_costs_has_none(tmp_path):
    assert read_costs(tmp_path) == StoredCosts()


@pytest.mark.parametrize("change", ["other run", "other questions", "no predictions"])
def test_costs_of_predictions_that_the_study_no_longer_has_are_not_shown(tmp_path, entry, change):
    write_costs(tmp_path, [entry])
    if change == "other run":
        predicted(tmp_path / "predictions", run="other")
    elif change == "other questions":
        predicted(tmp_path / "predictions", questions="other")
    else:
        (tmp_path / entry.predictions).unlink()
    assert read_costs(tmp_path).entries == ()


@pytest.mark.parametrize(
    "cost", [Cost(fit_bytes=-1.0), Cost(predict=Timing((1.0,), (0.0,))), Cost(latency=Timing(("2",), (1.0,)))]
)
def test_a_value_that_no_measurement_gives_is_refused(tmp_path, entry, cost):
    write_costs(tmp_path, [replace(entry, cost=cost)])
    with pytest.raises(ValueError, match=rf"{COSTS_FILE} is not a complete costs file.*run the command that made"):
        read_costs(tmp_path)


def test_a_changed_file_is_refused(tmp_path, entry):
    write_costs(tmp_path, [entry])
    path = tmp_path / COSTS_FILE
    path.write_text(path.read_text().replace("300.0", "30.0"))
    with pytest.raises(ValueError, match="SHA-256"):
        read_costs(tmp_path)
