import torch
from methods_cases import predict
from oracles.models import answer_logits

from bmoe_lightning.methods import MAP


def test_is_the_softmax_of_the_models_own_logits(model, batches):
    batch = batches[0]
    log_probs = predict(MAP(), model, batch)
    with torch.no_grad():
        exp = answer_logits(model, batch)[0].exp()
    torch.testing.assert_close(log_probs.exp(), exp / exp.sum(-1, keepdim=True), rtol=1e-12, atol=0)
    assert log_probs.dtype == torch.float64
    assert torch.equal(log_probs == -torch.inf, batch["absent"])
    assert MAP().hyperparameters({}) == {}
