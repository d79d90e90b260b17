import pytest
import torch
from methods_cases import predict, predictions
from oracles.models import answer_logits, as_modules, toy_model

from bmoe_lightning.curvature import ExpertLayers, LoRALayers
from bmoe_lightning.experts import expert_dropout, find_expert_layers, find_linear_layers
from bmoe_lightning.methods import MAP, BatchView, MCDropout


def test_averages_the_probabilities_of_passes_with_one_stream_of_masks(model, batches):
    layers = find_expert_layers(model)
    with expert_dropout(model, layers, 0.3, seed=5), torch.no_grad():
        passes = [answer_logits(model, batches[0])[0].softmax(-1) for _ in range(4)]
    log_probs = predict(MCDropout(num_samples=4, p=0.3), model, batches[0], seed=5)
    torch.testing.assert_close(log_probs.exp(), torch.stack(passes).mean(0), rtol=1e-12, atol=1e-15)
    assert torch.equal(log_probs == -torch.inf, batches[0]["absent"])
    assert (passes[0] - passes[1]).abs().max() > 1e-3


@pytest.mark.parametrize("layout", ["fused", "modules"])
def test_varies_with_its_seed_alone(layout, batches):
    model = toy_model() if layout == "fused" else as_modules(toy_model())
    first = predict(MCDropout(), model, batches[1], seed=1)
    torch.rand(3)
    predict(MCDropout(), model, batches[0], seed=1)
    assert torch.equal(first, predict(MCDropout(), model, batches[1], seed=1))
    assert not torch.allclose(first, predict(MCDropout(), model, batches[1], seed=2))
    assert not torch.allclose(first, predict(MAP(), model, batches[1]))


def test_leaves_nothing_behind(model, batches):
    state, implementation = torch.get_rng_state(), model.get_experts_implementation()
    model.train()
    before = answer_logits(model, batches[0])[0]
    predict(MCDropout(), model, batches[0])
    assert torch.equal(torch.get_rng_state(), state)
    assert model.get_experts_implementation() == implementation
    assert model.training
    assert torch.equal(answer_logits(model, batches[0])[0], before)


def test_leaves_nothing_behind_after_an_exception(model, batches):
    calls = []

    def failing(model, batch):
        calls.append(batch)
        if len(calls) == 2:
            raise OSError("stop")
        return answer_logits(model, batch)

    before = answer_logits(model, batches[0])[0]
    with pytest.raises(OSError, match="stop"):
        MCDropout().log_probs(BatchView(model, failing, batches[0]), {})
    assert torch.equal(answer_logits(model, batches[0])[0], before)
    assert model.get_experts_implementation() == {"": "eager"}


def test_other_methods_of_the_same_batch_see_no_dropout(model, batches):
    for methods in ([MCDropout(), MAP()], [MAP(), MCDropout()]):
        found = predictions(model, batches, *methods)
        alone = predictions(model, batches, MAP())
        assert torch.equal(found["map"].log_probs, alone["map"].log_probs)


@pytest.mark.parametrize("p", [0.0, 1.0, -0.1])
def test_refuses_a_probability_that_drops_nothing_or_all(p):
    with pytest.raises(ValueError, match=r"in \(0, 1\)"):
        MCDropout(p=p)


def adapted(p, seed=0):
    """The model under LoRA whose B is not zero."""
    peft = pytest.importorskip("peft")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = peft.LoraConfig(r=2, lora_dropout=p, target_modules=["query", "head"])
        model = peft.inject_adapter_in_model(config, toy_model()).double().eval()
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.data = torch.randn_like(parameter)
    return model


def test_a_model_under_lora_drops_what_lora_dropped_in_training(batches):
    """In front of A, and nothing in the experts."""
    model = adapted(0.3)
    with expert_dropout(model, find_linear_layers(model, "*.lora_A.*"), 0.3, seed=5), torch.no_grad():
        passes = [answer_logits(model, batches[0])[0].softmax(-1) for _ in range(4)]
    log_probs = predict(MCDropout(num_samples=4, p=0.3), model, batches[0], seed=5)
    torch.testing.assert_close(log_probs.exp(), torch.stack(passes).mean(0), rtol=1e-12, atol=1e-15)
    assert (passes[0] - passes[1]).abs().max() > 1e-3
    # As many passes in training mode have the same mean.
    many = predict(MCDropout(num_samples=200, p=0.3), model, batches[0]).exp()
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model.train()
        trained = torch.stack([answer_logits(model, batches[0])[0].softmax(-1) for _ in range(200)]).mean(0)
    torch.testing.assert_close(many, trained, rtol=0, atol=0.08)


def test_layers_of_ones_own_drop_whatever_lora_did(batches):
    model = adapted(0.0)
    experts = predict(MCDropout(num_samples=4, layers=ExpertLayers()), model, batches[0])
    matrices = predict(MCDropout(num_samples=4, layers=LoRALayers("A")), model, batches[0])
    assert not torch.allclose(experts, matrices)


@pytest.mark.parametrize(("p", "found"), [(0.3, "trained with 0.3"), (0.0, "trained with 0.0")])
def test_refuses_another_dropout_than_that_of_lora(p, found, batches):
    model = adapted(p)
    with pytest.raises(ValueError, match=f"a dropout probability of 0.1, and the LoRA of this model is {found}"):
        MCDropout().check_run(model, None)
    with pytest.raises(ValueError, match=found):
        predict(MCDropout(), model, batches[0])
    MCDropout(p=0.3).check_run(adapted(0.3), None)
    MCDropout().check_run(toy_model(), None)


def test_refuses_no_passes():
    with pytest.raises(ValueError, match="at least one"):
        MCDropout(num_samples=0)


def test_states_what_was_chosen():
    assert MCDropout(num_samples=3, p=0.2).hyperparameters({}) == {"num_samples": 3, "dropout": 0.2}
