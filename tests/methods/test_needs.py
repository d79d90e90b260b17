"""What methods need, and the one check of it."""

from __future__ import annotations

import pytest

from bmoe_lightning.methods import (
    MAP,
    Available,
    BayesianLoRA,
    CheckpointEnsemble,
    DeepEnsemble,
    EvidenceTemperature,
    LaplaceEvidence,
    LaplaceLPO,
    LaplaceMixture,
    MCDropout,
    check_needs,
)

ENOUGH = Available(calibration_inputs=100, snapshots=2, prior_mean=True, expert_dropout=0.1, runs=True, lora=True)
ALL = (
    MAP(),
    BayesianLoRA(),
    MCDropout(),
    CheckpointEnsemble(),
    DeepEnsemble(),
    LaplaceLPO(),
    LaplaceEvidence(),
    EvidenceTemperature(),
)


def test_what_is_enough_or_unknown_passes():
    check_needs(ALL, ENOUGH)
    check_needs([method for method in ALL if not method.needs.runs], Available())


@pytest.mark.parametrize(
    ("available", "message"),
    [
        (
            Available(calibration_inputs=0, runs=True),
            r"bayesian_lora, laplace_lpo, evidence_temperature are fitted on a validation split",
        ),
        (Available(calibration_inputs=99, runs=True), "evidence_temperature needs at least 100 inputs .* there are 99"),
        (Available(snapshots=1, runs=True), "checkpoint_ensemble needs the weights after at least 2 epochs, .*be 1"),
        (Available(prior_mean=False, runs=True), "laplace_evidence measures how far fine-tuning .*prior_mean='zero'"),
        (Available(expert_dropout=0.0, runs=True), "mc_dropout needs a model .*expert dropout, which is 0"),
        (
            Available(lora=False, runs=True),
            "bayesian_lora has its posterior over the matrices of LoRA, .* with LoRAFinetuner,",
        ),
        (Available(), "deep_ensemble needs the weights of 2 further fine-tuning runs; pass runs="),
    ],
)
def test_what_is_missing_is_named(available, message):
    with pytest.raises(ValueError, match=message):
        check_needs(ALL, available)


def test_a_method_that_needs_fits_to_further_runs_says_where_they_go():
    with pytest.raises(ValueError, match="one snapshot file for each, and fits= with the folder of a fit of laplace_"):
        check_needs([LaplaceMixture()], Available())
    with pytest.raises(ValueError, match=r"with one snapshot file for each$"):
        check_needs([DeepEnsemble()], Available())


def test_descriptions():
    assert MAP().needs.describe() == ""
    assert LaplaceLPO().needs.describe() == "held-out labels (64 or more are advised)"
    assert EvidenceTemperature().needs.describe() == "100 held-out inputs, the weights from before fine-tuning"
    assert EvidenceTemperature(prior_mean="zero").needs.describe() == "100 held-out inputs"
    assert CheckpointEnsemble().needs.describe() == "snapshots after at least 2 epochs"
    assert DeepEnsemble().needs.describe() == "2 further fine-tuning runs"
    assert DeepEnsemble(size=2).needs.describe() == "1 further fine-tuning run"
    of_fits = LaplaceMixture(component="laplace_evidence", prior_mean="zero").needs.describe()
    assert of_fits == "2 further fine-tuning runs with a fit of laplace_evidence to each"
    assert MCDropout().needs.describe() == "expert dropout in training"
    assert BayesianLoRA().needs.describe().endswith("advised), a model fine-tuned with LoRA")
    assert LaplaceLPO().needs.calibration
    assert not LaplaceEvidence().needs.calibration
