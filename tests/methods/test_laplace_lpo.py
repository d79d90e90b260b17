import pytest
import torch
from methods_cases import RANK3
from oracles.models import answer_logits, split, toy_batch, toy_model

from bmoe_lightning.methods import LaplaceLPO, fit_methods


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
