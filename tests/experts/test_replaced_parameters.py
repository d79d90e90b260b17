"""Parameters that one thread sees replaced, while the model's own are what every other thread sees."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from bmoe_lightning.experts.replaced_parameters import is_replaceable, replaced_parameters, replacement


@pytest.fixture
def model():
    return nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))


@pytest.fixture
def other():
    with ThreadPoolExecutor(1) as pool:
        yield lambda action: pool.submit(action).result()


def zeros_for(parameter):
    new = replacement(parameter)
    with torch.no_grad():
        new.zero_()
    return new


INPUT = torch.ones(1, 3)


class TestReplaceable:
    def test_is_what_modules_read_as_their_attribute(self, model):
        assert all(is_replaceable(model, parameter) for parameter in model.parameters())

    def test_recurrent_and_scripted_modules_read_their_own(self):
        for module in (nn.GRU(2, 2), torch.jit.script(nn.Linear(2, 2))):
            holder = nn.Sequential(module, nn.Linear(2, 2))
            found = {name: is_replaceable(holder, p) for name, p in holder.named_parameters()}
            assert found == {name: name.startswith("1.") for name in found}

    def test_a_subclass_may_compute_its_values(self, model):
        class Packed(nn.Parameter):
            pass

        model[0].weight = Packed(torch.zeros(3, 3))
        assert not is_replaceable(model, model[0].weight)


def test_a_replacement_is_alike(model):
    weight = model[0].weight.requires_grad_(False)
    weight.note = "kept"
    with torch.inference_mode():
        found = replacement(weight)
    assert (found.shape, found.dtype, found.requires_grad, found.note) == (weight.shape, weight.dtype, False, "kept")
    assert not found.is_inference()
    assert found.data_ptr() != weight.data_ptr()


class TestReplaced:
    @pytest.mark.parametrize("fails", [False, True])
    def test_is_seen_by_this_thread_alone_and_gone_afterwards(self, model, other, fails):
        before = {name: (id(p), p.detach().clone()) for name, p in model.named_parameters()}
        dictionaries = [id(module._parameters) for module in model]
        expected = model(INPUT).detach()
        weight, bias = model[1].weight, model[1].bias

        def use():
            with replaced_parameters(model, {p: zeros_for(p) for p in (weight, bias)}):
                assert not model(INPUT).any()
                assert not dict(model.named_parameters())["1.weight"].any()
                assert torch.equal(other(lambda: model(INPUT).detach()), expected)
                assert other(lambda: model[1].weight) is weight
                assert other(lambda: dict(model.named_parameters())["1.weight"]) is weight
                if fails:
                    raise KeyError

        if fails:
            with pytest.raises(KeyError):
                use()
        else:
            use()
        assert torch.equal(model(INPUT), expected)
        assert {name: id(p) for name, p in model.named_parameters()} == {name: i for name, (i, _) in before.items()}
        assert all(torch.equal(p, before[name][1]) for name, p in model.named_parameters())
        assert [id(module._parameters) for module in model] == dictionaries

    def test_a_tied_parameter_is_replaced_wherever_it_is(self, model):
        model[1].weight = model[0].weight
        with replaced_parameters(model, {model[0].weight: zeros_for(model[0].weight)}):
            assert model[0].weight is model[1].weight
            assert not model[1].weight.any()

    def test_may_be_nested(self, model):
        first, bias = model[0].weight, model[1].bias
        with replaced_parameters(model, {first: zeros_for(first)}):
            inner = replacement(model[0].weight)
            with torch.no_grad():
                inner.fill_(2)
            with replaced_parameters(model, {model[0].weight: inner, bias: zeros_for(bias)}):
                assert bool((model[0].weight == 2).all())
                assert not model[1].bias.any()
            assert not model[0].weight.any()
            assert model[1].bias is bias
        assert model[0].weight is first

    def test_a_cast_meanwhile_reaches_the_model(self, model):
        weight = model[0].weight
        values = weight.detach().clone()
        with replaced_parameters(model, {weight: zeros_for(weight)}):
            model.double()
        assert model[0].weight is weight
        assert weight.dtype == torch.float64
        assert torch.equal(weight, values.double())
        assert model[1].bias.dtype == torch.float64

    def test_what_is_added_meanwhile_stays(self, model):
        weight = model[0].weight
        with replaced_parameters(model, {weight: zeros_for(weight)}):
            model[0].register_parameter("scale", nn.Parameter(torch.ones(1)))
        assert "scale" in model[0]._parameters
        assert model[0].weight is weight

    def test_a_copy_has_what_this_thread_sees(self, model):
        weight = model[0].weight
        with replaced_parameters(model, {weight: zeros_for(weight)}):
            copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
        for copied in copies:
            assert type(copied[0]._parameters) is dict
            assert not copied[0].weight.any()
        assert weight.any()

    def test_the_dictionary_is_one(self, model):
        module, weight = model[0], model[0].weight
        with replaced_parameters(model, {weight: zeros_for(weight)}):
            seen, kept = module._parameters, zeros_for(weight)
            assert (list(seen), len(seen)) == (["weight", "bias"], 2)
            assert [name for name, _ in seen.items()] == list(seen.keys()) == list(seen.copy())
            assert seen.get("none") is seen.pop("none", None) is None
            with pytest.raises(KeyError):
                seen.pop("none")
            # Parametrisations take a parameter away for a moment, and set another one.
            assert not seen.pop("weight").any()
            assert "weight" not in seen
            assert list(seen) == ["bias"]
            seen["weight"] = kept
            assert module.weight is kept
        assert module.weight is weight

    def test_beside_a_parametrisation(self, model, other):
        parametrizations.weight_norm(model[0])
        original = model[0].parametrizations.weight.original1
        expected = model(INPUT).detach()
        new = replacement(original)
        with torch.no_grad():
            new.copy_(-original)
        with replaced_parameters(model, {original: new}):
            assert not torch.equal(model(INPUT), expected)
            assert torch.equal(other(lambda: model(INPUT).detach()), expected)
        assert torch.equal(model(INPUT), expected)

    def test_gradients_go_to_the_replacement(self, model):
        weight = model[0].weight
        new = zeros_for(weight)
        with replaced_parameters(model, {weight: new}):
            model(INPUT).sum().backward()
        assert new.grad is not None
        assert weight.grad is None
