"""Gate and up projections as layers of a posterior: their slots, factors and covariances, against written-out ones."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from oracles.dense import experts_modules, softmax_hessian
from oracles.models import answer_logits, as_modules, split, tiny_qwen, toy_batch, toy_model
from oracles.own_models import Buffers, with_mixtures
from oracles.training import train_only
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from bmoe_lightning.curvature import Curvature, ExpertLayers, collect_factors
from bmoe_lightning.curvature.gradient_share import GradientShareRecorder
from bmoe_lightning.curvature.kfac import prior_factors
from bmoe_lightning.experts import down_proj_parameters, find_expert_layers
from bmoe_lightning.experts.discovery import locate_expert_layers
from bmoe_lightning.laplace import LaplacePosterior
from bmoe_lightning.methods import LaplaceEvidence, LaplaceLPO, evaluate, fit_methods
from bmoe_lightning.methods.storage import load_fit, save_fit

BOTH = ("down_proj", "gate_up_proj")


def first_layers(model):
    return find_expert_layers(model, projections=("gate_up_proj",))


def traced_forward(self, hidden_states, top_k_index, top_k_weights):
    """A plain loop over experts that keeps inputs and outputs of the first product."""
    total = torch.zeros_like(hidden_states)
    for expert in range(self.num_experts):
        tokens, choice = torch.where(top_k_index == expert)
        first = hidden_states[tokens] @ self.gate_up_proj[expert].T
        self.first_trace.append((expert, hidden_states[tokens].detach(), first))
        gate, up = first.chunk(2, dim=-1)
        outputs = (self.act_fn(gate) * up) @ self.down_proj[expert].T
        total = total.index_add(0, tokens, outputs * top_k_weights[tokens, choice].unsqueeze(1))
    return total


@contextmanager
def traced(model):
    if ALL_EXPERTS_FUNCTIONS.get("first_projections_loop") is None:
        ALL_EXPERTS_FUNCTIONS.register("first_projections_loop", traced_forward)
    before = model.get_experts_implementation()
    model.set_experts_implementation("first_projections_loop")
    for module in experts_modules(model):
        module.first_trace = []
    try:
        yield [module.first_trace for module in experts_modules(model)]
    finally:
        model.set_experts_implementation(before)
        for module in experts_modules(model):
            del module.first_trace


def dense_factors(model, batch):
    """Counted slots `[E]`, and both full factors of each layer's first product, from autograd in a plain loop."""
    with traced(model) as traces:
        logits, _ = answer_logits(model, batch)
    hessian = softmax_hessian(logits).sum(0) if len(logits) == 1 else None
    assert hessian is not None, "one example, so that every slot is its own"
    found = []
    for trace in traces:
        a, g, slots = [], [], []
        for _, inputs, outputs in trace:
            gradients = torch.stack(
                [
                    torch.autograd.grad(logits[0, k], outputs, retain_graph=True, materialize_grads=True)[0]
                    for k in range(logits.shape[1])
                ]
            )
            counted = (gradients != 0).any(2).any(0) & (inputs != 0).any(1)
            inputs, gradients = inputs[counted], gradients[:, counted]
            slots.append(float(counted.sum()))
            a.append(inputs.T @ inputs / max(slots[-1], 1))
            g.append(torch.einsum("ck,csi,ksj->ij", hessian, gradients, gradients) / max(slots[-1], 1))
        found.append((torch.tensor(slots).double(), torch.stack(a), torch.stack(g)))
    return found


def full(basis, eigenvalues):
    return basis @ torch.diag_embed(eigenvalues) @ basis.mT


def test_factors_are_those_of_a_plain_loop():
    model, batch = toy_model(), toy_batch(num_rows=1)
    factors = collect_factors(model, answer_logits, [batch], rank=10, layers=first_layers(model))
    for layer, (slots, a, g) in zip(factors.layers, dense_factors(model, batch), strict=True):
        assert torch.equal(layer.slots, slots)
        torch.testing.assert_close(full(layer.a_basis, layer.a_eigenvalues), a, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(full(layer.g_basis, layer.g_eigenvalues), g, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("layout", ["fused", "modules"])
@pytest.mark.parametrize("projections", [("gate_up_proj",), BOTH])
def test_prior_covariance_is_that_of_the_jacobian(layout, projections):
    model, batch = toy_model(), toy_batch()
    if layout == "modules":
        model = as_modules(model)
    layers = find_expert_layers(model, projections=projections)
    posterior = LaplacePosterior(prior_factors(model, layers), prior_precision=2.0)
    _, found = posterior.logit_covariance(model, answer_logits, batch)
    weights = [weight for layer in layers for weight in down_proj_parameters(model, layer).values()]
    logits, _ = answer_logits(model, batch)
    rows = [
        torch.cat(
            [part.flatten() for part in torch.autograd.grad(value, weights, retain_graph=True, materialize_grads=True)]
        )
        for value in logits.flatten()
    ]
    jacobian = torch.stack(rows).view(*logits.shape, -1)
    torch.testing.assert_close(found, jacobian @ jacobian.mT / 2, rtol=1e-9, atol=1e-12)


def test_separate_projections_have_the_factors_of_one_parameter():
    fused = toy_model()
    separate, batches = as_modules(fused), split(toy_batch(num_rows=8), 4, 4)
    together, apart = (
        collect_factors(model, answer_logits, batches, rank=12, layers=first_layers(model))
        for model in (fused, separate)
    )
    names = [layer.name.partition(":") for layer in apart.layers]
    assert {last for _, _, last in names} == {"valve", "lift"}
    for at, layer in enumerate(together.layers):
        parts = {name[2]: part for name, part in zip(names, apart.layers, strict=True) if f"layers.{at}." in name[0]}
        whole = full(layer.g_basis, layer.g_eigenvalues)
        for part, block in (("valve", slice(0, 5)), ("lift", slice(5, 10))):
            one = parts[part]
            torch.testing.assert_close(
                full(one.a_basis, one.a_eigenvalues), full(layer.a_basis, layer.a_eigenvalues), rtol=1e-9, atol=1e-12
            )
            torch.testing.assert_close(
                full(one.g_basis, one.g_eigenvalues), whole[:, block, block], rtol=1e-9, atol=1e-12
            )


@pytest.mark.parametrize("layout", ["fused", "modules"])
def test_kappa_is_one_where_all_three_are_covered_and_trained(layout):
    model = toy_model() if layout == "fused" else as_modules(toy_model())
    train_only(model, ".crew.")
    layers = find_expert_layers(model, projections=BOTH)
    down = find_expert_layers(model)
    recorder = GradientShareRecorder(model, layers, choices=[[layer.name for layer in down]])
    collect_factors(model, answer_logits, [toy_batch()], rank=3, layers=layers, share=recorder)
    shares = recorder.finish()
    assert shares.of([layer.name for layer in layers]).kappa == 1
    assert shares.of([layer.name for layer in down]).kappa > 1
    everything = shares.squares[:, 1:].sum(1)
    torch.testing.assert_close(everything, shares.squares[:, 0], rtol=1e-12, atol=0)


class TestLayers:
    def test_of_one_module_stand_together(self):
        model = toy_model()
        layers = find_expert_layers(model, projections=BOTH)
        assert [(layer.name, layer.index, layer.d_in, layer.d_out) for layer in layers] == [
            ("layers.0.mixture.crew:gate_up_proj", 0, 6, 10),
            ("layers.0.mixture.crew", 1, 5, 6),
            ("layers.1.mixture.crew:gate_up_proj", 2, 6, 10),
            ("layers.1.mixture.crew", 3, 5, 6),
        ]
        assert [layer.module_name for layer in layers[:2]] == ["layers.0.mixture.crew"] * 2
        assert [layer.is_first for layer in layers[:2]] == [True, False]

    def test_are_located_in_a_module_that_contains_the_model(self):
        model = toy_model()
        layers = find_expert_layers(model, projections=BOTH)
        outer = torch.nn.ModuleDict({"network": model})
        found = locate_expert_layers(outer, layers)
        assert [layer.name for layer in found] == [f"network.{layer.name}" for layer in layers]

    def test_of_a_model_of_transformers(self):
        model, batch = tiny_qwen(), toy_batch()
        layers = find_expert_layers(model, projections=BOTH)
        assert [layer.d_out for layer in layers] == [24, 16] * 2
        with torch.no_grad():
            expected, _ = answer_logits(model, batch)
        posterior = LaplacePosterior(collect_factors(model, answer_logits, [batch], rank=3, layers=layers))
        logits, covariance = posterior.logit_covariance(model, answer_logits, batch)
        torch.testing.assert_close(logits, expected, rtol=1e-6, atol=1e-6)
        parts = [posterior.without_layers([1, 3]), posterior.without_layers([0, 2])]
        separate = [part.logit_covariance(model, answer_logits, batch)[1] for part in parts]
        torch.testing.assert_close(sum(separate), covariance, rtol=1e-9, atol=1e-12)


class TestFit:
    CURVATURE = Curvature(rank=3, layers=ExpertLayers(projections=["down_proj", "gate_up_proj"]))

    def test_from_the_factors_to_a_stored_prediction(self, tmp_path):
        model, train, held_out = toy_model(), split(toy_batch(num_rows=16, seed=3), 8, 8), [toy_batch(num_rows=12)]
        before = {name: value + 0.1 for name, value in model.state_dict().items() if ".crew." in name}
        methods = [LaplaceEvidence(curvature=self.CURVATURE), LaplaceLPO(curvature=self.CURVATURE, num_samples=100)]
        fit = fit_methods(methods, model, answer_logits, train, held_out, prior_mean=before)
        assert fit.state_of(methods[0])["prior_precision"].shape == (4,)
        found = evaluate(methods, fit, model, answer_logits, held_out)
        save_fit(tmp_path, fit)
        loaded, _ = load_fit(tmp_path)
        again = evaluate(methods, loaded, model, answer_logits, held_out)
        for name, predictions in found.items():
            assert torch.equal(predictions.log_probs, again[name].log_probs)

    @pytest.mark.parametrize("layout", ["fused", "modules"])
    def test_beside_a_posterior_of_other_projections(self, layout, tmp_path):
        model = toy_model() if layout == "fused" else as_modules(toy_model())
        train, held_out = split(toy_batch(num_rows=16, seed=3), 8, 8), [toy_batch(num_rows=12)]
        before = {name: value + 0.1 for name, value in model.state_dict().items() if ".crew." in name}
        plain = LaplaceEvidence(curvature=Curvature(rank=3))
        both = LaplaceEvidence(name="both", curvature=self.CURVATURE)
        alone = {}
        for method in (plain, both):
            fit = fit_methods([method], model, answer_logits, train, held_out, prior_mean=before)
            alone |= evaluate([method], fit, model, answer_logits, held_out)
        assert not torch.equal(alone[plain.name].log_probs, alone[both.name].log_probs)
        for order in ([plain, both], [both, plain]):
            fit = fit_methods(order, model, answer_logits, train, held_out, prior_mean=before)
            save_fit(tmp_path / order[0].name, fit)
            loaded, _ = load_fit(tmp_path / order[0].name)
            for name, found in evaluate(order, loaded, model, answer_logits, held_out).items():
                torch.testing.assert_close(found.log_probs, alone[name].log_probs, rtol=1e-12, atol=1e-14)
                assert torch.equal(found.labels, alone[name].labels)

    def test_specifications_of_earlier_versions_are_the_same(self):
        assert Curvature().digest == "ffb2953d"
        assert "projections" not in ExpertLayers().description()
        assert self.CURVATURE.digest != Curvature(rank=3).digest
        assert hash(self.CURVATURE.layers) == hash(ExpertLayers(projections=BOTH))


class TestRefused:
    def test_unknown(self):
        for wrong in (("up",), ()):
            with pytest.raises(ValueError, match="projections must be some of down_proj, gate_up_proj"):
                find_expert_layers(toy_model(), projections=wrong)

    def test_where_the_forward_is_registered(self):
        model = with_mixtures(Buffers)
        assert len(find_expert_layers(model)) == 2
        with pytest.raises(ValueError, match=r"run their gate and up projections where they cannot be tapped"):
            find_expert_layers(model, projections=BOTH)

    def test_with_shared_experts(self):
        with pytest.raises(ValueError, match="name their linear layers with LinearLayers"):
            find_expert_layers(tiny_qwen(), projections=BOTH, shared_experts=True)
