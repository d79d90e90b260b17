"""The posterior over the head's answer rows."""

import pytest
import torch
from oracles.models import answer_logits, split, toy_batch, toy_model

from bmoe_lightning.curvature import Curvature, ExpertLayers
from bmoe_lightning.methods import LaplaceLastLayer, LaplaceLPO, evaluate, fit_methods
from bmoe_lightning.methods.laplace_last_layer import OutputHead
from bmoe_lightning.testing import check_method, tiny_model

BATCHES = split(toy_batch(num_rows=60, seed=3), 20, 20, 20)


def hidden_states(model, batch):
    """What enters the head for each answer, `[B, d]`, and the class logits."""
    seen = []
    with model.head.register_forward_pre_hook(lambda _, args: seen.append(args[0])), torch.no_grad():
        logits = answer_logits(model, batch)[0]
    return seen[0].reshape(-1, seen[0].shape[-1]), logits


def test_finds_the_output_embeddings_of_transformers_also_when_tied():
    model = tiny_model()
    (layer,) = OutputHead().find(model)
    assert layer.name == "lm_head"
    model.lm_head.weight = model.model.embed_tokens.weight
    assert OutputHead().find(torch.nn.ModuleDict({"network": model}))[0].name == "network.lm_head"


def test_a_model_of_another_kind_has_to_name_its_head():
    with pytest.raises(ValueError, match="head='pattern'"):
        OutputHead().find(toy_model())
    assert OutputHead("head").find(toy_model())[0].name == "head"


def test_covariance_is_that_of_the_answer_rows():
    """`Lambda_ij` over the full head equals the dense posterior over the rows that move a logit."""
    model, batch = toy_model(), toy_batch(num_rows=3)
    method = LaplaceLastLayer(head="head").with_defaults(Curvature(rank=40, sketch="exact"))
    fit = fit_methods([method], model, answer_logits, BATCHES, BATCHES)
    precision = fit.state_of(method)["prior_precision"]
    posterior = fit.posteriors[method.spec.digest].with_prior_precision(precision)
    _, covariance = posterior.logit_covariance(model, answer_logits, batch)

    (layer,) = posterior.factors.layers
    a = layer.a_basis[0] @ torch.diag(layer.a_eigenvalues[0]) @ layer.a_basis[0].T
    g = layer.g_basis[0] @ torch.diag(layer.g_eigenvalues[0]) @ layer.g_basis[0].T
    moved = g.diagonal() > 1e-12
    rows = moved.nonzero().flatten()
    weight = model.head.weight
    logits = answer_logits(model, batch)[0]
    jacobians = [
        [torch.autograd.grad(value, weight, retain_graph=True)[0] for value in example if value.isfinite()]
        for example in logits
    ]
    for example, (gradients, found) in enumerate(zip(jacobians, covariance, strict=True)):
        jacobian = torch.stack([gradient[rows].flatten() for gradient in gradients])
        outside = torch.stack([gradient[~moved].flatten() for gradient in gradients])
        assert not outside.any(), "a row without curvature moves a logit"
        fisher = float(layer.slots[0]) * torch.kron(g[rows][:, rows], a)
        dense = fisher + precision[0] * torch.eye(len(fisher), dtype=fisher.dtype)
        expected = jacobian @ torch.linalg.solve(dense, jacobian.T)
        present = logits[example].isfinite()
        torch.testing.assert_close(found[present][:, present], expected, rtol=1e-8, atol=1e-10)


def test_stands_beside_a_posterior_over_the_experts():
    model = toy_model()
    curvature = Curvature(rank=3, skip_layers=(1,))
    methods = [method.with_defaults(curvature) for method in (LaplaceLPO(), LaplaceLastLayer(head="head"))]
    assert methods[1].spec.skip_layers == ()
    fit = fit_methods(methods, model, answer_logits, BATCHES, BATCHES)
    assert len(fit.posteriors) == 2
    together = evaluate(methods, fit, model, answer_logits, BATCHES)
    for method in methods:
        alone = evaluate([method], fit, model, answer_logits, BATCHES)[method.name]
        torch.testing.assert_close(together[method.name].log_probs, alone.log_probs, rtol=1e-9, atol=1e-12)


def test_a_curvature_of_its_own_is_over_the_head_too():
    run = Curvature(rank=3, skip_layers=(1,))
    own = LaplaceLastLayer(curvature=Curvature(rank=5, layers=ExpertLayers()), head="head").with_defaults(run)
    assert own.spec == Curvature(rank=5, layers=OutputHead("head"))
    assert own.with_defaults(run) == own
    named = LaplaceLastLayer(curvature=Curvature(layers=OutputHead("head"))).with_defaults(run)
    assert named.spec.layers == OutputHead("head")


def test_keeps_the_contract_with_tied_weights(monkeypatch):
    from bmoe_lightning import testing

    def tied(seed=0):
        model = tiny_model(seed)
        model.lm_head.weight = model.model.embed_tokens.weight
        return model

    monkeypatch.setattr(testing, "tiny_model", tied)
    check_method(LaplaceLastLayer(num_samples=100))
