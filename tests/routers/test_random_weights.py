"""Routers with other or random weights: limits, covariances against samples, gradients, reproducibility and state."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from oracles.models import answer_logits, toy_batch, toy_model

from bmoe_lightning.routers import (
    Draws,
    DropoutInputs,
    EnsembleMembers,
    FineTunedWeights,
    PositionNoise,
    Router,
    StepDraws,
    SwagSamples,
    averaged_scores,
    find_routers,
    load_router_state,
    mean_routers,
    probe_routers,
    recorded_signals,
    router_state,
    router_weight,
    sampled_routes,
    trained_routers,
)

BATCH = toy_batch(num_rows=4)
ROUTER = Router("router", 0, 5, 12, "experts", top_k=2, score="softmax")


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def fine_tuned(router, weight, scale):
    net = FineTunedWeights(router, dtype=weight.dtype)
    net.shift.data += scale * randn(*weight.shape, seed=router.index)
    return net


def dropout(router, weight, scale, rate=0.3):
    net = DropoutInputs(router, weight, rate, trains_weight=True, dtype=weight.dtype)
    net.shift.data += scale * randn(*weight.shape, seed=router.index)
    return net


def untrained_dropout(router, weight, scale):
    return DropoutInputs(router, weight, 0.3 * scale, dtype=weight.dtype)


def swag(router, weight, scale):
    net = SwagSamples(router, 3, dtype=weight.dtype)
    net.fit(scale * randn(5, *weight.shape, seed=router.index))
    return net


def ensemble(router, weight, scale):
    net = EnsembleMembers(router, 3, dtype=weight.dtype)
    net.fit(scale * randn(3, *weight.shape, seed=router.index))
    return net


KINDS = {entry.__name__: entry for entry in (fine_tuned, dropout, untrained_dropout, swag, ensemble)}
RANDOM = {name: kind for name, kind in KINDS.items() if kind is not fine_tuned}


def kinds(chosen=KINDS):
    return pytest.mark.parametrize("kind", chosen.values(), ids=chosen)


def nets_of(model, kind, scale=1.0):
    routers = probe_routers(model, find_routers(model), lambda: answer_logits(model, BATCH)[0])
    widest = torch.promote_types(next(model.parameters()).dtype, torch.float32)
    return [kind(router, router_weight(model, router).to(widest), scale) for router in routers]


def logits_of(model, context=None, batch=BATCH):
    with torch.no_grad():
        if context is None:
            return answer_logits(model, batch)[0]
        with context:
            return answer_logits(model, batch)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@kinds()
def test_without_noise_or_training_the_model_is_bitwise_the_same(kind, dtype):
    model, noise = toy_model().to(dtype), PositionNoise(0)
    plain = logits_of(model)
    without = {"dropout": lambda router, weight, _: dropout(router, weight, 0.0, rate=0.0)}.get(kind.__name__, kind)
    nets = nets_of(model, without, scale=0.0)
    assert torch.equal(logits_of(model, sampled_routes(model, nets, [1], noise)), plain)
    assert torch.equal(logits_of(model, mean_routers(model, nets)), plain)
    if all(net.is_still for net in nets):
        assert torch.equal(logits_of(model, averaged_scores(model, nets, 3, noise)), plain)
    else:
        double = toy_model()
        averaged = averaged_scores(double, nets_of(double, without, scale=0.0), 3, noise)
        torch.testing.assert_close(logits_of(double, averaged), logits_of(double), rtol=0, atol=1e-12)
    assert all(net.is_still for net in nets) == (kind not in (fine_tuned, dropout))
    with_noise = logits_of(model, sampled_routes(model, nets_of(model, kind), [1], noise))
    assert not torch.equal(with_noise, plain)


def test_one_member_equal_members_and_no_variance_are_the_fine_tuned_router():
    model, noise = toy_model(), PositionNoise(0)
    tuned = nets_of(model, fine_tuned)
    expected = logits_of(model, mean_routers(model, tuned))

    def equal(router, weight, members):
        net = EnsembleMembers(router, members, dtype=weight.dtype)
        net.fit(tuned[router.index].shift.expand(members, *weight.shape))
        return net

    def constant(router, weight, rank):
        net = SwagSamples(router, rank, dtype=weight.dtype)
        net.fit(tuned[router.index].shift.expand(rank + 1, *weight.shape))
        return net

    def undropped(router, weight, _):
        net = DropoutInputs(router, weight, 0.0, trains_weight=True, dtype=weight.dtype)
        net.shift.data.copy_(tuned[router.index].shift)
        return net

    for kind, number in ((equal, 1), (equal, 4), (constant, 2), (undropped, 0)):
        nets = nets_of(model, kind, number)
        for context in (mean_routers(model, nets), sampled_routes(model, nets, [2], noise)):
            torch.testing.assert_close(logits_of(model, context), expected, rtol=0, atol=1e-12)
        with recorded_signals(model, nets) as signals:
            logits_of(model)
        assert all(variance.abs().max() < 1e-25 for calls in signals.variances.values() for variance in calls)


class ManyDraws(Draws):
    """Many samples at once, from torch's generator."""

    def __init__(self, count, tokens):
        super().__init__(range(count))
        self.tokens = tokens

    def of_tokens(self, width, kind="normal"):
        return self.drawn((len(self.samples), self.tokens, width), kind)

    def shared(self, width, kind="normal"):
        return self.drawn((len(self.samples), width), kind)

    def drawn(self, shape, kind):
        generator = torch.Generator().manual_seed(0)
        return (torch.randn if kind == "normal" else torch.rand)(shape, generator=generator)


@kinds({name: kind for name, kind in RANDOM.items() if kind is not ensemble})
def test_the_covariance_of_samples_is_the_closed_form(kind):
    net = kind(ROUTER, randn(5, 12, seed=7), 0.5)
    u, logits = randn(2, 12, seed=3), randn(2, 5, seed=4)
    found = net.distribution(u, logits)
    samples = net.samples(u, logits, ManyDraws(100_000, 2))
    assert torch.equal(found.mean, net.mean(u, logits))
    for token in range(2):
        covariance = found.covariance()[token]
        error = torch.linalg.matrix_norm(samples[:, token].T.cov() - covariance)
        assert error < 0.03 * torch.linalg.matrix_norm(covariance)
        assert (samples[:, token].mean(0) - found.mean[token]).norm() < 0.02 * covariance.trace().sqrt()
    torch.testing.assert_close(found.trace(), found.covariance().diagonal(dim1=1, dim2=2).sum(1))


def test_the_members_of_an_ensemble_are_its_samples():
    net = ensemble(ROUTER, randn(5, 12), 0.5)
    u, logits = randn(2, 12, seed=3), randn(2, 5, seed=4)
    members = net.samples(u, logits, ManyDraws(6, 2))
    assert torch.equal(members[:3], members[3:])
    for member, shift in zip(members[:3], net.shifts, strict=True):
        torch.testing.assert_close(member, logits + u @ shift.T)
    found = net.distribution(u, logits)
    torch.testing.assert_close(found.mean, members[:3].mean(0))
    torch.testing.assert_close(net.mean(u, logits), members[:3].mean(0))
    for token in range(2):
        torch.testing.assert_close(found.covariance()[token], members[:3, token].T.cov())


def test_dropout_has_a_mask_for_each_token_and_swag_a_weight_for_all():
    u, logits = randn(1, 12).expand(4, 12), randn(1, 5).expand(4, 5)
    for kind, shared in ((dropout, False), (swag, True)):
        for sample in kind(ROUTER, randn(5, 12), 0.5).samples(u, logits, ManyDraws(3, 4)):
            assert torch.equal(sample[0], sample[1]) == shared


@kinds()
def test_rows_get_the_same_logits_alone_padded_and_in_copies(kind):
    model, noise = toy_model(), PositionNoise(1)
    nets, state = nets_of(model, kind, 0.5), torch.get_rng_state()
    found = torch.stack([logits_of(model, sampled_routes(model, nets, [s], noise)) for s in range(3)])
    copies = {name: values.repeat(3, *[1] * (values.dim() - 1)) for name, values in BATCH.items()}
    together = logits_of(model, sampled_routes(model, nets, [0, 1, 2], noise), copies)
    torch.testing.assert_close(together.view_as(found), found, rtol=0, atol=1e-9)
    padded = {name: torch.nn.functional.pad(BATCH[name], (3, 0)) for name in ("ids", "mask")}
    again = logits_of(model, sampled_routes(model, nets, [0], PositionNoise(1)), padded)
    torch.testing.assert_close(again, found[0], rtol=0, atol=1e-9)
    alone = {name: values[:1] for name, values in padded.items()}
    again = logits_of(model, sampled_routes(model, nets, [0], noise), alone)
    torch.testing.assert_close(again, found[0, :1], rtol=0, atol=1e-9)
    scores = logits_of(model, averaged_scores(model, nets, 6, noise), padded)
    torch.testing.assert_close(logits_of(model, averaged_scores(model, nets, 6, noise)), scores, rtol=0, atol=1e-9)
    assert ((found[0] - found[1]).abs().max() > 1e-3) == (kind is not fine_tuned)
    assert torch.equal(torch.get_rng_state(), state)


def test_chunks_of_samples_change_nothing(monkeypatch):
    model = toy_model()
    nets = nets_of(model, dropout)
    expected = logits_of(model, averaged_scores(model, nets, 7, PositionNoise(0)))
    assert nets[0].floats_per_token == nets[0].router.d_in
    from bmoe_lightning.routers import draws, prediction
    from bmoe_lightning.routers.scores import sample_chunks

    chunks = []

    def small(num_samples, floats):
        chunks.append([*sample_chunks(num_samples, floats, 3 * floats)])
        return chunks[-1]

    monkeypatch.setattr(prediction, "sample_chunks", small)
    monkeypatch.setattr(draws, "_STORED_FLOATS", 0)  # nor does it matter which numbers are kept
    found = logits_of(model, averaged_scores(model, nets, 7, PositionNoise(0)))
    assert [len(chunk) for chunk in chunks[0]] == [3, 3, 1]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@kinds({"fine_tuned": fine_tuned, "undropped": lambda *given: dropout(*given, rate=0.0)})
def test_gradients_and_logits_are_those_of_the_weight_itself(kind):
    model = toy_model().requires_grad_(False)
    nets = nets_of(model, kind)
    with trained_routers(model, nets, seed=3) as training:
        training.begin(0)
        found = answer_logits(model, BATCH)[0]
        found.square().mean().backward()
        assert float(training.penalty().detach()) == 0
        assert 0 < training.statistics()["changed"][0] < 1
    other = copy.deepcopy(model)
    for net in nets:
        weight = other.get_submodule(net.router.name).weight
        weight.requires_grad_(True).data += net.shift.data
    expected = answer_logits(other, BATCH)[0]
    expected.square().mean().backward()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)
    for net in nets:
        gradient = other.get_submodule(net.router.name).weight.grad
        torch.testing.assert_close(net.shift.grad, gradient, rtol=1e-9, atol=1e-12)


def test_gradients_under_dropout_are_those_of_finite_differences():
    net = dropout(ROUTER, randn(5, 12), 0.5)
    u, logits = randn(3, 12, seed=3), randn(3, 5, seed=4)
    masks = StepDraws(ROUTER, 3, seed=0, step=2, call=0, device=torch.device("cpu"))

    def trained(shift):
        return torch.func.functional_call(_Trained(net), {"net.shift": shift}, (u, logits, masks))

    assert torch.autograd.gradcheck(trained, [net.shift.detach().clone().requires_grad_()])
    assert not torch.allclose(trained(net.shift), net.mean(u, logits))
    assert not net.trained(u, logits, masks).penalty.any()


class _Trained(torch.nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, *given):
        return self.net.trained(*given).logits


@kinds(RANDOM)
def test_signals_are_in_closed_form(kind):
    model, seen = toy_model(), {}
    nets = nets_of(model, kind)

    class Kept(type(nets[0])):
        def distribution(self, u, logits):
            seen[self.router.index] = found = super().distribution(u, logits)
            return found

    for net in nets:
        net.__class__ = Kept
    with recorded_signals(model, nets) as signals, mean_routers(model, nets):
        logits_of(model)
    centring = torch.eye(4, dtype=torch.float64) - 0.25
    for index, found in seen.items():
        expected = (centring @ found.covariance() @ centring).diagonal(dim1=-2, dim2=-1).sum(-1)
        assert (expected > 0).all()
        torch.testing.assert_close(signals.variances[index][0], expected, rtol=1e-9, atol=0)


@kinds()
def test_a_state_is_read_back(kind):
    model = toy_model()
    nets = nets_of(model, kind)
    state = router_state(nets)
    assert all(value.device.type == "cpu" and not value.requires_grad for value in state.values())
    others = nets_of(model, kind, 0.0)
    load_router_state(others, state)
    assert not any(net.is_still for net in others)
    one, two = (logits_of(model, sampled_routes(model, of, [1], PositionNoise(0))) for of in (nets, others))
    assert torch.equal(one, two)
    lacking = dict(list(state.items())[1:])
    with pytest.raises(ValueError, match="use the options that they were trained with"):
        load_router_state(others, lacking)


def test_states_of_other_options_are_refused():
    model = toy_model()
    nets = nets_of(model, swag)
    for other in (SwagSamples(nets[0].router, 4), EnsembleMembers(nets[0].router, 3)):
        with pytest.raises(ValueError, match="use the options"):
            load_router_state([other], router_state(nets[:1]))
    untrained = [DropoutInputs(net.router, router_weight(model, net.router), 0.1) for net in nets]
    with pytest.raises(ValueError, match="use the options"):
        load_router_state(untrained, router_state(nets_of(model, dropout)))


def test_options_that_make_no_router_are_refused():
    for rank in (1, 0, -1):
        with pytest.raises(ValueError, match="at least 2 collected weights"):
            SwagSamples(ROUTER, rank)
    with pytest.raises(ValueError, match="weights of 3 steps or more, and there are 2"):
        SwagSamples(ROUTER, 3).fit(randn(2, 5, 12))
    with pytest.raises(ValueError, match="at least one member"):
        EnsembleMembers(ROUTER, 0)
    with pytest.raises(ValueError, match="for the 2 members"):
        EnsembleMembers(ROUTER, 2).fit(randn(3, 5, 12))
    with pytest.raises(ValueError, match="a probability below 1"):
        DropoutInputs(ROUTER, randn(5, 12), 1.0)
    with pytest.raises(ValueError, match="pass its own"):
        DropoutInputs(ROUTER, randn(4, 12), 0.1)
    masks = ManyDraws(1, 2)
    for net in (SwagSamples(ROUTER, 2), EnsembleMembers(ROUTER, 2)):
        with pytest.raises(NotImplementedError, match="FineTunedWeights"):
            net.trained(randn(2, 12), randn(2, 5), masks)


def test_collected_weights_that_are_kept_are_those_of_the_rank():
    net = SwagSamples(ROUTER, 2, dtype=torch.float64)
    shifts = randn(6, 5, 12)
    net.fit(shifts)
    torch.testing.assert_close(net.mean_shift, shifts.mean(0))
    torch.testing.assert_close(net.deviations[-1], shifts[-1] - shifts.mean(0))
    assert net.deviations.untyped_storage().nbytes() == 2 * 5 * 12 * 8
    found = net.distribution(randn(1, 12), randn(1, 5))
    assert found.factor.shape == (1, 5, 2)
    assert dataclasses.is_dataclass(found)
