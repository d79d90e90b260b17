import torch
from methods_cases import drawn, predict
from oracles.models import answer_logits

from bmoe_lightning.methods import MAP, BatchView, TemperatureScaling, fit_methods
from bmoe_lightning.methods.base import scalar
from bmoe_lightning.methods.temperature_search import fit_temperature


def test_divides_the_logits(model, batches):
    view = BatchView(model, answer_logits, batches[0])
    log_probs = predict(TemperatureScaling(), model, batches[0], {"temperature": scalar(2.0)})
    torch.testing.assert_close(log_probs, (view.logits / 2).log_softmax(-1))
    plain = predict(MAP(), model, batches[0])
    assert torch.equal(log_probs == -torch.inf, batches[0]["absent"])
    assert torch.equal(log_probs.argmax(-1), plain.argmax(-1))
    assert torch.equal(predict(TemperatureScaling(), model, batches[0], {"temperature": scalar(1.0)}), plain)


def test_is_fitted_on_the_labelled_logits(model, batches):
    method = TemperatureScaling()
    state = fit_methods([method], model, answer_logits, [], batches).state_of(method)
    with torch.no_grad():
        pairs = [answer_logits(model, batch) for batch in batches]
    expected = fit_temperature(torch.cat([pair[0] for pair in pairs]), torch.cat([pair[1] for pair in pairs]))
    assert method.hyperparameters(state) == {"temperature": expected}


def test_fits_other_labels_and_is_the_model_without_any():
    logits, labels = drawn(2.0)
    state = {"temperature": scalar(1.3)}
    assert float(TemperatureScaling().refit(state, logits, labels)["temperature"]) == fit_temperature(logits, labels)
    assert float(TemperatureScaling().refit(state, logits[:0], labels[:0])["temperature"]) == 1.0
