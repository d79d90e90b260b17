"""The command, on a fine-tuning of seconds."""

from __future__ import annotations

import pytest
import torch
from methods_cases import drawn

from bmoe_lightning.methods.temperature_search import fit_temperature
from bmoe_lightning.utils.safetensors_io import read_tensor_file
from recipes.calibration_study import cases as cases_module
from recipes.calibration_study.__main__ import main
from recipes.calibration_study.cases import CALIBRATED, Kind, cases
from recipes.calibration_study.settings import StudySettings


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(cases_module, "KINDS", (Kind("fails to learn", items=16, epochs=1, pretrained=False),))
    monkeypatch.setattr(cases_module, "CALIBRATION_ITEMS", 110)


@pytest.mark.slow
def test_a_study_writes_both_tables_and_repeats_nothing(tmp_path, capsys, quick):
    arguments = ["--output-dir", str(tmp_path), "--seeds", "1", "--split-sizes", "32", "--label-draws", "2", "--quiet"]
    arguments += ["--methods", "map,temperature,laplace_evidence,mc_dropout"]
    assert main(arguments) == 0
    first = capsys.readouterr().out
    assert "fine-tuning: built-in, fails to learn, seed 0" in first
    assert main(arguments) == 0
    second = capsys.readouterr().out
    assert "fine-tuning:" not in second
    assert second.strip() == first[first.index("| regret") :].strip()
    for name in ("temperatures", "split_sizes"):
        assert (tmp_path / f"{name}.md").read_text().strip() in second
    assert "MC dropout" not in second  # it needs the model itself


@pytest.mark.slow
def test_what_is_stored_is_of_the_fine_tuned_model(tmp_path, quick):
    (made,) = cases(StudySettings(output_dir=str(tmp_path), seeds=1, quiet=True))
    assert len(made.calibration.labels) == 110
    assert len(made.test.labels) == 399
    covariance = made.test.cache.covariance(made.precisions["layer"])
    assert bool((torch.linalg.eigvalsh(covariance)[:, -1] > 0).all())
    (path,) = (tmp_path / "cases").iterdir()
    assert read_tensor_file(path, format="calibration case", version=1).description == {
        "case": "built-in, fails to learn, seed 0"
    }


class Stored(torch.nn.Module):
    """Gives each batch its own logits and labels."""

    def class_logits(self, batch):
        return batch


def test_a_calibrated_model_has_nothing_to_correct():
    """Its logits are divided by the best temperature of all held-out questions."""
    logits, labels = drawn(2.5, count=2000)
    loaders = [
        list(zip(part.split(100), of_part.split(100), strict=True))
        for part, of_part in ((logits[:900], labels[:900]), (logits[900:], labels[900:]))
    ]
    model = Stored().train()
    temperature = cases_module._best_temperature(model, loaders)
    assert model.training
    assert temperature == pytest.approx(fit_temperature(logits, labels), rel=1e-9)
    divided, same = cases_module._divided_logits(temperature, model, (logits, labels))
    assert same is labels
    assert fit_temperature(divided, labels) == pytest.approx(1, rel=1e-3)
    (kind,) = [kind for kind in cases_module.KINDS if kind.name == CALIBRATED]
    assert kind.calibrated


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--split-sizes", "0"], "--split-sizes must be positive"),
        (["--methods", "mc_dropout"], "--methods: each of them needs more"),
        (["--seeds", "0"], "seeds"),
    ],
)
def test_what_cannot_be_measured_is_a_usage_error(capsys, arguments, message):
    assert main(arguments) == 2
    assert message in capsys.readouterr().err
