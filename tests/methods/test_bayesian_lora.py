"""The posterior over the matrices of LoRA, against dense references in float64."""

from dataclasses import replace

import pytest
import torch
from oracles.dense import dense_ggn, low_rank_blocks, softmax_hessian
from oracles.models import ANSWERS, answer_logits, split, toy_batch, toy_model
from oracles.own_models import assert_exact

from bmoe_lightning.curvature import Curvature, LinearLayers, LoRALayers, collect_factors
from bmoe_lightning.laplace import LaplacePosterior
from bmoe_lightning.methods import BayesianLoRA, LaplaceEvidence, LaplaceLPO, evaluate, fit_methods

peft = pytest.importorskip("peft")

BATCHES = split(toy_batch(num_rows=60, seed=3), 20, 20, 20)
EXACT = Curvature(rank=40, sketch="exact")
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:LPO ended at the limit"),
]


def adapted(seed=5, targets=("query", "value", "head"), rank=2, **options):
    """A toy model under LoRA whose B is not zero, as after training."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.1, target_modules=list(targets))
        model = peft.inject_adapter_in_model(config, toy_model(**options)).double().eval()
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.data = 0.3 * torch.randn_like(parameter)
    return model


def matrices(model):
    """The matrices of LoRA by name, in order."""
    return {name: p for name, p in model.named_parameters() if ".lora_" in name}


def observed(model, batch):
    """Inputs `[S, d_in]` and gradients `[K, S, d_out]` of each matrix, the example of each slot, and the Jacobians.

    By hooks and derivatives of its own: one row of the batch is one example.
    """
    seen, hooks = [], []
    for name in matrices(model):
        module = model.get_submodule(name.removesuffix(".weight"))
        hooks.append(module.register_forward_hook(lambda _, args, output: seen.append((args[0], output))))
    logits = answer_logits(model, batch)[0]
    for hook in hooks:
        hook.remove()
    outputs, weights = [output for _, output in seen], list(matrices(model).values())
    per_class = [
        torch.autograd.grad(logits[:, k].sum(), outputs, retain_graph=True, materialize_grads=True)
        for k in range(logits.shape[1])
    ]
    jacobians = [[torch.autograd.grad(f, weights, retain_graph=True) for f in row] for row in logits]
    layers = []
    for i, (inputs, output) in enumerate(seen):
        owners = torch.arange(len(output)).view(-1, 1).expand(output.shape[:2]).flatten()
        gradients = torch.stack([g[i].flatten(0, 1) for g in per_class])
        jacobian = torch.stack([torch.stack([g[i].flatten() for g in row]) for row in jacobians])
        layers.append((inputs.detach().flatten(0, 1), gradients, owners, jacobian))
    return logits.detach(), layers


def kfac_blocks(model, batches):
    """`n (1/n sum a a^T) kron (1/n sum E[g g^T])` of each matrix, summed slot by slot."""
    counts, inputs, outputs = {}, {}, {}
    for batch in batches:
        logits, layers = observed(model, batch)
        hessians = softmax_hessian(logits)
        for i, (a, g, owners, _) in enumerate(layers):
            for slot, owner in enumerate(owners):
                if bool(g[:, slot].any()) and bool(a[slot].any()):
                    counts[i] = counts.get(i, 0) + 1
                    inputs[i] = inputs.get(i, 0) + torch.outer(a[slot], a[slot])
                    outputs[i] = outputs.get(i, 0) + g[:, slot].T @ hessians[owner] @ g[:, slot]
    return [torch.kron(outputs[i], inputs[i]) / counts[i] for i in sorted(counts)]


def fit(method, model, batches=BATCHES, **options):
    found = fit_methods([method], model, answer_logits, batches, batches, **options)
    return found, found.posteriors[method.spec.digest], found.state_of(method)["prior_precision"]


def test_factors_are_the_sums_of_k_fac():
    model = adapted()
    _, posterior, _ = fit(BayesianLoRA().with_defaults(EXACT), model)
    assert [layer.name for layer in posterior.factors.layers] == [n.removesuffix(".weight") for n in matrices(model)]
    for layer, expected in zip(posterior.factors.layers, kfac_blocks(model, BATCHES), strict=True):
        torch.testing.assert_close(low_rank_blocks(layer)[0], expected, rtol=1e-9, atol=1e-11)


def test_covariance_is_that_of_the_dense_posterior():
    """`sum_l J_l (n A kron G + lambda I)^-1 J_l^T` over A and B of the attention and of the head."""
    model, batch = adapted(), toy_batch(num_rows=4, seed=9)
    method = BayesianLoRA().with_defaults(EXACT)
    found, posterior, precision = fit(method, model)
    assert len(precision) == 2 * (2 * 2 + 1)
    assert len(set(precision.tolist())) == 1
    logits, layers = observed(model, batch)
    expected = 0
    for (*_, jacobian), block, value in zip(layers, kfac_blocks(model, BATCHES), precision, strict=True):
        dense = block + value * torch.eye(len(block), dtype=block.dtype)
        expected = expected + jacobian @ torch.linalg.solve(dense, jacobian.mT)
    here, covariance = posterior.with_prior_precision(precision).logit_covariance(model, answer_logits, batch)
    torch.testing.assert_close(here, logits, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(covariance, expected, rtol=1e-8, atol=1e-10)
    # And the probabilities are averages of samples of the logits, not the softmax of averaged logits.
    log_probs = evaluate([method], found, model, answer_logits, [batch])[method.name].log_probs
    noise = torch.randn(4, 100_000, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    samples = logits.unsqueeze(1) + noise @ torch.linalg.cholesky(covariance).mT
    torch.testing.assert_close(log_probs.exp(), samples.softmax(-1).mean(1), rtol=0, atol=0.01)


def test_equals_the_ggn_where_every_example_has_one_and_the_same_token():
    """The head's matrices see one token an example. The number of examples counts once, and not squared."""
    model, row = adapted(targets=["head"]), toy_batch(num_rows=1)
    batch = {name: value.repeat(3, *[1] * (value.dim() - 1)) for name, value in row.items()}
    logits, layers = observed(model, batch)
    factors = collect_factors(
        model, answer_logits, split(batch, 2, 1), rank=40, sketch="exact", layers=LoRALayers().find(model)
    )
    for layer, (*_, jacobian) in zip(factors.layers, layers, strict=True):
        exact = dense_ggn(jacobian.unsqueeze(2), softmax_hessian(logits))[0]
        assert exact.abs().max() > 1e-3
        torch.testing.assert_close(low_rank_blocks(layer)[0], exact, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("sketch", ["exact", "nystrom"])
def test_the_large_side_of_the_heads_b_has_the_rank_of_the_answers(sketch):
    """Rows of words that are no answer have no gradient, so K - 1 eigenpairs represent a vocabulary exactly."""
    model = adapted()
    head = [layer for layer in LoRALayers("B").find(model) if "head" in layer.name]
    factors = collect_factors(model, answer_logits, BATCHES, rank=len(ANSWERS) - 1, sketch=sketch, layers=head)
    (layer,) = factors.layers
    full = collect_factors(model, answer_logits, BATCHES, rank=30, sketch="exact", layers=head)
    torch.testing.assert_close(low_rank_blocks(layer)[0], low_rank_blocks(full.layers[0])[0], rtol=1e-6, atol=1e-9)
    rows = layer.g_basis[0].abs().amax(1) > 1e-7
    assert set(rows.nonzero().flatten().tolist()) <= set(ANSWERS)


def test_factors_do_not_depend_on_the_batch_size():
    model = adapted()
    whole = toy_batch(num_rows=12, seed=4)
    layers = LoRALayers().find(model)
    options = {"rank": 3, "sketch": "exact", "layers": layers}
    one = collect_factors(model, answer_logits, [whole], **options)
    many = collect_factors(model, answer_logits, split(whole, 1, 5, 2, 4), **options)
    twice = collect_factors(model, answer_logits, [whole, whole], **options)
    for a, b, c in zip(one.layers, many.layers, twice.layers, strict=True):
        torch.testing.assert_close(low_rank_blocks(b)[0], low_rank_blocks(a)[0], rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(low_rank_blocks(c)[0], 2 * low_rank_blocks(a)[0], rtol=1e-9, atol=1e-11)


def test_a_tied_head_is_adapted_in_its_use_as_a_head():
    model = toy_model()
    model.head.weight = model.words.weight
    config = peft.LoraConfig(r=2, target_modules=["head"])
    model = peft.inject_adapter_in_model(config, model).double().eval()
    model.head.lora_B.default.weight.data.normal_(generator=torch.Generator().manual_seed(1))
    assert_exact(model, LoRALayers().find(model))


def test_the_evidence_is_a_matter_of_the_layers():
    """Distances from the initial matrices: those of B, which starts at zero, are its norms."""
    model = adapted()
    mean = {name: (p * 0.5 if ".lora_A." in name else 0 * p).detach() for name, p in matrices(model).items()}
    curvature = replace(EXACT, layers=LoRALayers())
    method = LaplaceEvidence(name="evidence", curvature=curvature)
    _, posterior, precision = fit(method, model, prior_mean=mean)
    found = dict(zip([layer.name for layer in posterior.factors.layers], precision, strict=True))
    for layer, block in zip(posterior.factors.layers, kfac_blocks(model, BATCHES), strict=True):
        weight = model.get_parameter(f"{layer.name}.weight").detach()
        distance = float((weight - mean[f"{layer.name}.weight"]).square().sum())
        eigenvalues = torch.linalg.eigvalsh(block).clamp(min=0)
        value = found[layer.name]
        assert float((eigenvalues / (eigenvalues + value)).sum()) == pytest.approx(float(value) * distance, rel=1e-3)


def test_stands_beside_a_posterior_over_the_experts():
    model = adapted()
    run = Curvature(rank=3, skip_layers=(1,))
    methods = [method.with_defaults(run) for method in (LaplaceLPO(), BayesianLoRA())]
    assert methods[1].spec == Curvature(rank=3, layers=LoRALayers())
    found = fit_methods(methods, model, answer_logits, BATCHES, BATCHES)
    assert len(found.posteriors) == 2
    together = evaluate(methods, found, model, answer_logits, BATCHES)
    for method in methods:
        alone = evaluate([method], found, model, answer_logits, BATCHES)[method.name]
        torch.testing.assert_close(together[method.name].log_probs, alone.log_probs, rtol=1e-9, atol=1e-12)


def test_a_curvature_of_its_own():
    run = Curvature(rank=3)
    own = BayesianLoRA(curvature=Curvature(rank=5)).with_defaults(run)
    assert own.spec == Curvature(rank=5, layers=LoRALayers())
    part = Curvature(rank=5, layers=LoRALayers("B"), skip_layers=(0,))
    assert BayesianLoRA(curvature=part).with_defaults(run).spec == part


def test_a_model_without_lora_is_refused():
    with pytest.raises(ValueError, match="ToyMoE has no layer with an active, unmerged LoRA adapter"):
        fit(BayesianLoRA().with_defaults(EXACT), toy_model())


def test_the_posterior_is_of_a_and_b(tmp_path):
    """A file of the posterior serves the model with its adapters; other matrices are other weights."""
    model = adapted()
    _, posterior, precision = fit(BayesianLoRA().with_defaults(replace(EXACT, rank=3)), model)
    posterior.with_prior_precision(precision).save(tmp_path / "posterior.safetensors")
    served = LaplacePosterior.load(tmp_path / "posterior.safetensors")
    expected = posterior.with_prior_precision(precision).predict(model, answer_logits, BATCHES[0])
    torch.testing.assert_close(served.predict(model, answer_logits, BATCHES[0]), expected)
    with pytest.raises(RuntimeError, match="fitted to other weights"):
        served.predict(adapted(seed=6), answer_logits, BATCHES[0])


def test_options_of_its_curvature_are_kept_and_other_layers_refused():
    own = BayesianLoRA(curvature=Curvature(rank=5, skip_layers=(0, 1))).with_defaults(Curvature(rank=3))
    assert own.spec == Curvature(rank=5, skip_layers=(0, 1), layers=LoRALayers())
    with pytest.raises(ValueError, match=r"over the matrices of LoRA, and its curvature selects LinearLayers"):
        BayesianLoRA(curvature=Curvature(layers=LinearLayers("lm_head")))
