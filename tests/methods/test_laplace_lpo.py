import math

import pytest
import torch
from methods_cases import RANK3
from oracles.models import answer_logits, split, toy_batch, toy_model

from bmoe_lightning.methods import LaplaceEvidence, LaplaceLPO, fit_methods


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_is_what_the_posterior_finds_by_itself(scope):
    model, batches = toy_model(), split(toy_batch(num_rows=60, seed=3), 20, 20, 20)
    method = LaplaceLPO(curvature=RANK3, scope=scope)
    fit = fit_methods([method], model, answer_logits, batches, batches)
    found = fit.state_of(method)["prior_precision"]
    posterior = fit.posteriors[RANK3.digest]
    expected = posterior.fit_prior_lpo(model, answer_logits, batches, scope=scope).prior_precision
    assert found.tolist() == pytest.approx(expected.tolist(), rel=1e-6)
    assert torch.equal(fit.served_posterior(RANK3.digest).prior_precision, found)


def test_labels_of_absent_classes_are_refused(model, batches):
    wrong = [{**batch, "labels": torch.where(batch["absent"][:, 3], 3, batch["labels"])} for batch in batches]
    with pytest.raises(ValueError, match="name a class that their example does not have"):
        fit_methods([LaplaceLPO(curvature=RANK3)], model, answer_logits, batches, wrong)


def test_the_pull_needs_the_evidence_and_leads_to_it(model, batches):
    pretrained = {name: weight.detach() + 0.05 for name, weight in model.named_parameters() if "down_proj" in name}
    pulled = LaplaceLPO(curvature=RANK3, evidence_width=1e-3)
    evidence = LaplaceEvidence(curvature=RANK3)
    assert pulled.needs.prior_mean
    fit = fit_methods([pulled, evidence], model, answer_logits, batches, batches, prior_mean=pretrained)
    found, centre = (fit.state_of(method)["prior_precision"].tolist() for method in (pulled, evidence))
    assert found == pytest.approx(centre, rel=1e-3)
    with pytest.raises(ValueError, match="weights from before"):
        fit_methods([pulled], model, answer_logits, batches, batches)


def test_without_the_pull_nothing_of_the_evidence_is_needed():
    assert not LaplaceLPO().needs.prior_mean
    assert not LaplaceLPO(evidence_width=1.0, prior_mean="zero").needs.prior_mean
    for width in (0.0, math.nan):
        with pytest.raises(ValueError, match="evidence_width must be a positive number or None"):
            LaplaceLPO(evidence_width=width)


def test_a_layer_that_the_labels_do_not_determine_marks_the_row(caplog):
    model = toy_model(num_layers=3)
    with torch.no_grad():
        model.head.weight.mul_(3)
        held_out = toy_batch(num_rows=90, seed=12)
        probabilities = (answer_logits(model, held_out)[0] / 2.5).softmax(-1)
    generator = torch.Generator().manual_seed(4)
    held_out["labels"] = torch.multinomial(probabilities, 1, generator=generator).squeeze(1)
    by_layer = LaplaceLPO(curvature=RANK3)
    one = LaplaceLPO(name="one", curvature=RANK3, scope="global")
    training = [toy_batch(num_rows=60, seed=11)]
    fit = fit_methods([by_layer, one], model, answer_logits, training, [held_out])
    (sentence,) = [said for said in fit.warnings_of(by_layer) if "of some layers is not determined" in said]
    assert "in layer layers.1.mixture.crew)" in sentence  # alone
    assert sentence not in fit.warnings_of(one)
    assert sum(sentence in record.message for record in caplog.records) == 1
