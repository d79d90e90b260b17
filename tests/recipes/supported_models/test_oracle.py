"""The oracle for model families, against the tests' own oracle and against cases computed by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from oracles import dense
from oracles.models import answer_logits, as_modules, split, toy_batch, toy_model
from torch import nn

from bmoe_lightning.experts import find_expert_layers
from recipes.supported_models.oracle import (
    DenseFactors,
    Observation,
    ObservedSlots,
    dense_factors,
    dense_logit_covariance,
    observe,
    weighted_jacobians,
)
from recipes.supported_models.watch import OracleError, SecondWeights, down_proj_weights

D_IN, D_OUT, EXPERTS, CLASSES = 3, 2, 2, 2


def watched(model):
    return [down_proj_weights(model, layer) for layer in find_expert_layers(model)]


@pytest.mark.parametrize("layout", ["fused", "modules"])
class TestAgainstTheTestsOwnOracle:
    def both(self, layout):
        fused = toy_model()
        model = as_modules(fused) if layout == "modules" else fused
        batches = split(toy_batch(6), 4, 2)
        weights = watched(model)
        mine = [observe(model, answer_logits, batch, weights) for batch in batches]
        theirs = [dense.observe(fused, answer_logits, batch) for batch in batches]
        return fused, weights, mine, theirs

    def test_factors(self, layout):
        _, weights, mine, theirs = self.both(layout)
        for position, found in enumerate(dense_factors(mine, weights)):
            slots, a, g = 0, 0, 0
            for logits, layers in theirs:
                seen = layers[position]
                part = dense.dense_kfac(seen, dense.softmax_hessian(logits), seen.owners, 4)
                slots = slots + part.slots
                a = a + part.a * part.slots.view(-1, 1, 1)
                g = g + part.g * part.slots.view(-1, 1, 1)
            count = slots.clamp(min=1).view(-1, 1, 1)
            torch.testing.assert_close(found.slots, slots, rtol=0, atol=0)
            torch.testing.assert_close(found.a, a / count, rtol=1e-12, atol=0)
            torch.testing.assert_close(found.g, g / count, rtol=1e-10, atol=1e-15)

    def test_jacobians_and_covariance(self, layout):
        fused, weights, mine, _ = self.both(layout)
        batch = split(toy_batch(6), 4, 2)[0]
        logits, _ = answer_logits(fused, batch)
        expected = dense.weight_jacobians(logits, [m.down_proj for m in dense.experts_modules(fused)])
        for jacobian, reference in zip(mine[0].jacobians, expected, strict=True):
            torch.testing.assert_close(jacobian.flatten(3), reference, rtol=1e-10, atol=1e-14)
        factors = dense_factors(mine, weights)
        blocks = [[layer.block(expert) for expert in range(4)] for layer in factors]
        torch.testing.assert_close(
            dense_logit_covariance(mine[0].jacobians, factors, 2.0),
            dense.dense_logit_covariance(expected, blocks, [2.0, 2.0]),
            rtol=1e-9,
            atol=1e-14,
        )

    def test_a_weighted_sum_of_logits(self, layout):
        fused, _, mine, _ = self.both(layout)
        model = as_modules(fused) if layout == "modules" else fused
        mix = torch.rand(4, 4, dtype=torch.float64)
        logits, gradients = weighted_jacobians(model, answer_logits, split(toy_batch(6), 4, 2)[0], watched(model), mix)
        torch.testing.assert_close(logits, mine[0].logits)
        for gradient, jacobian in zip(gradients, mine[0].jacobians, strict=True):
            torch.testing.assert_close(gradient, torch.einsum("nk,nkeoi->eoi", mix, jacobian))


class Handmade(nn.Module):
    """Two examples, one slot each for expert 0, two slots for expert 1; logits are `readout` of weighted outputs.

    A product of `form` computes what comes out of an expert; `x[n]` are the inputs that example n sends to expert e.
    """

    def __init__(self, form, weight):
        super().__init__()
        self.form = form
        self.weight = nn.Parameter(weight)
        self.readout = torch.tensor([[1.0, -2.0], [0.5, 3.0]], dtype=torch.float64)  # [K, d_out]

    def forward(self, x):
        """`x [n, E, d_in]` to logits `[n, K]`."""
        outputs = self.form(x, self.weight)  # [n, E, d_out]
        outputs *= torch.tensor([2.0, -1.0]).view(1, 2, 1)  # routing weights, in place
        return outputs.sum(1) @ self.readout.T


def each(product):
    """A product for one expert, called on one expert after the other."""
    return lambda x, weight: torch.stack([product(x[:, e], weight, e) for e in range(EXPERTS)], dim=1)


FORMS = {
    "linear": (False, each(lambda x, w, e: F.linear(x, w[e]))),
    "linear with bias": (False, each(lambda x, w, e: F.linear(x, w[e], bias=torch.ones(D_OUT).double()))),
    "one slot at a time": (False, each(lambda x, w, e: torch.stack([F.linear(row, w[e]) for row in x]))),
    "transposed @": (True, each(lambda x, w, e: x @ w[e])),
    "method matmul": (True, each(lambda x, w, e: x.matmul(other=w[e]))),
    "mm of a transpose": (False, each(lambda x, w, e: torch.mm(x, w[e].t()))),
    "addmm": (True, each(lambda x, w, e: torch.addmm(torch.ones(D_OUT).double(), x, w[e]))),
    "weight on the left": (False, each(lambda x, w, e: (w[e] @ x.T).T)),
    "bmm": (True, lambda x, w: torch.bmm(x.transpose(0, 1), w).transpose(0, 1)),
    "bmm of a transpose": (False, lambda x, w: torch.bmm(x.transpose(0, 1), w.mT).transpose(0, 1)),
    "broadcast": (True, lambda x, w: (x.unsqueeze(2) @ w).squeeze(2)),
    "baddbmm": (True, lambda x, w: torch.baddbmm(torch.zeros(1, 1, 1).double(), x.transpose(0, 1), w).transpose(0, 1)),
    "in float32": (True, each(lambda x, w, e: (x.float() @ w[e].float()).double())),
    "to float32": (False, each(lambda x, w, e: F.linear(x.float(), w.to(torch.float32)[e]).double())),
    "rows of a flat weight": (True, each(lambda x, w, e: x @ w.view(EXPERTS, D_IN, D_OUT)[e])),
    "chunks": (True, each(lambda x, w, e: x @ w.reshape(-1, D_OUT).chunk(EXPERTS)[e])),
}


def handmade(form, transposed, flat=False):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(EXPERTS, D_OUT, D_IN, generator=generator, dtype=torch.float64)
    stored = weight.mT.contiguous() if transposed else weight.clone()
    model = Handmade(form, stored.flatten(0, 1) if flat else stored)
    return model, SecondWeights("experts", (model.weight,), EXPERTS, D_IN, D_OUT, transposed)


def logits_of(model, batch):
    return model(batch), None


INPUTS = torch.arange(1.0, 13.0, dtype=torch.float64).view(2, EXPERTS, D_IN)


@pytest.mark.parametrize("name", FORMS)
def test_every_form_of_product(name):
    transposed, form = FORMS[name]
    model, weights = handmade(form, transposed, flat=name == "rows of a flat weight")
    seen = observe(model, logits_of, INPUTS, [weights]).slots[0]
    routing = torch.tensor([2.0, -1.0], dtype=torch.float64)
    found = {
        (int(expert), tuple(row.tolist())): seen.gradients[:, :, slot]
        for slot, (expert, row) in enumerate(zip(seen.experts, seen.inputs, strict=True))
    }
    assert set(found) == {(e, tuple(INPUTS[n, e].tolist())) for n in range(2) for e in range(EXPERTS)}
    for n in range(2):
        for e in range(EXPERTS):
            gradient = found[e, tuple(INPUTS[n, e].tolist())]
            torch.testing.assert_close(gradient[n], routing[e] * model.readout)
            assert not gradient[1 - n].any()


def test_a_module_an_expert():
    linears = nn.ModuleList(nn.Linear(D_IN, D_OUT).double() for _ in range(EXPERTS))
    model, _ = handmade(lambda x, _: torch.stack([linears[e](x[:, e]) for e in range(EXPERTS)], dim=1), False)
    weights = SecondWeights("experts", tuple(x.weight for x in linears), EXPERTS, D_IN, D_OUT, False)
    seen = observe(model, logits_of, INPUTS, [weights]).slots[0]
    assert seen.experts.tolist() == [0, 0, 1, 1]
    assert torch.equal(seen.inputs, INPUTS.transpose(0, 1).flatten(0, 1))


class TestRefused:
    @pytest.mark.parametrize(
        ("form", "message"),
        [
            (lambda x, w: torch.einsum("nei,eoi->neo", x, w), "einsum"),
            (each(lambda x, w, e: torch.addmm(torch.ones(D_OUT).double(), x, w[e].T, alpha=2)), "alpha"),
            (each(lambda x, w, e: torch.cat([F.linear(x, w[e, :1]), F.linear(x, w[e, 1:])], 1)), "no expert's"),
            # The gradient of a gathered copy reaches the weight, but no slot is seen.
            (lambda x, w: torch.bmm(x.transpose(0, 1), w[torch.arange(EXPERTS)].mT).transpose(0, 1), "another way"),
            (each(lambda x, w, e: F.linear(x, w[e]) + w[e].sum()), "another way"),
        ],
    )
    def test_products_that_are_not_followed(self, form, message):
        model, weights = handmade(form, False)
        with pytest.raises(OracleError, match=message):
            observe(model, logits_of, INPUTS, [weights])

    def test_a_wrong_idea_of_the_layout(self):
        model, weights = handmade(FORMS["linear"][1], False)
        wrong = SecondWeights("experts", weights.parameters, EXPERTS, D_IN, D_OUT, True)
        with pytest.raises(OracleError, match="no expert's"):
            observe(model, logits_of, INPUTS, [wrong])

    def test_layers_that_share_a_weight(self):
        model, weights = handmade(FORMS["linear"][1], False)
        other = SecondWeights("more experts", weights.parameters, EXPERTS, D_IN, D_OUT, False)
        with pytest.raises(OracleError, match="'experts' and 'more experts' share"):
            observe(model, logits_of, INPUTS, [weights, other])

    def test_a_layer_of_other_sizes(self):
        model = toy_model()
        layer = find_expert_layers(model)[0]
        model.get_submodule(layer.name).down_proj = nn.Parameter(torch.zeros(3, 2, 2))
        with pytest.raises(OracleError, match="should hold 4 weights of 6 x 5"):
            down_proj_weights(model, layer)


def test_which_slots_count():
    inputs, gradients = torch.ones(4, 2).double(), torch.ones(1, 2, 4, 3).double()
    inputs[0] = 0  # nothing goes in
    gradients[:, :, 1] = 0  # no logit sees what comes out
    inputs[2, 0], gradients[0, 0, 2] = 0, 0  # in part only
    seen = ObservedSlots(torch.tensor([0, 0, 0, 1]), inputs, gradients)
    assert seen.counted.tolist() == [False, False, True, True]
    layer = SecondWeights("experts", (), 3, 2, 3, False)
    observation = Observation(torch.zeros(1, 2).double(), (seen,), ())
    (factors,) = dense_factors([observation], [layer])
    assert factors.slots.tolist() == [1, 1, 0]
    assert factors.a[0].tolist() == [[0, 0], [0, 1]]
    # p = 1/2 for both: E delta delta^T = 1/4 (g_0 - g_1)(g_0 - g_1)^T, zero where both gradients are alike.
    torch.testing.assert_close(factors.g[0], torch.full((3, 3), 0.25).double())
    assert not factors.g[1].any()
    assert not factors.a[2].any()


def test_covariance_by_hand():
    one = torch.ones(1, 1, 1, dtype=torch.float64)
    factors = DenseFactors(3 * one.view(1), 2 * one, 5 * one)  # F = 30 for the one weight
    jacobian = torch.tensor([1.0, -4.0]).double().view(1, 2, 1, 1, 1)
    covariance = dense_logit_covariance([jacobian, jacobian], [factors, factors], 2.0)
    expected = 2 * torch.tensor([[1.0, -4.0], [-4.0, 16.0]]).double() / 32
    torch.testing.assert_close(covariance, expected.unsqueeze(0))


def test_absent_classes_have_no_derivative():
    model = toy_model()
    batch = toy_batch(2)
    batch["absent"] = torch.tensor([[False, False, True, False], [False, False, False, False]])
    seen = observe(model, answer_logits, batch, watched(model))
    assert seen.logits[0, 2] == -torch.inf
    assert not seen.jacobians[0][0, 2].any()
    assert seen.jacobians[0][1, 2].any()


def test_the_model_is_left_as_it_was():
    model = toy_model()
    layer = find_expert_layers(model)[0]
    weight = model.get_submodule(layer.name).down_proj.requires_grad_(False)
    observe(model, answer_logits, toy_batch(2), watched(model))
    assert not weight.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())
