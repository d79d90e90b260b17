"""Random choice of experts against enumeration."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch.special import gammaincc

from bmoe_lightning.routers import sample_noise
from bmoe_lightning.routers.selection import (
    gate_entropy,
    log_probability,
    restrict,
    sample_experts,
    tempered_divergence,
)

DRAWS, N, K = 100_000, 5, 2
LOGITS = torch.tensor([1.0, 0.2, -0.5, 0.4, -1.3], dtype=torch.float64)
ORDERED = torch.tensor(list(itertools.permutations(range(N), K)))


def gumbel(*shape, seed=0):
    return sample_noise(shape, seed=seed, router=0, samples=[0], kind="gumbel")[0]


def enumerated(temperature=1.0, num_chosen=K):
    """The probability of each ordered choice, by the definition."""
    probabilities = (LOGITS / temperature).softmax(-1).tolist()
    found = []
    for order in itertools.permutations(range(N), num_chosen):
        left, product = 1.0, 1.0
        for expert in order:
            product *= probabilities[expert] / left
            left -= probabilities[expert]
        found.append(product)
    return torch.tensor(found, dtype=torch.float64)


def p_value(counts, expected):
    """Of a chi-square test with all cells but one free."""
    statistic = ((counts - expected).square() / expected).sum()
    return gammaincc(torch.tensor((len(counts) - 1) / 2, dtype=torch.float64), statistic / 2).item()


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_frequencies_are_those_of_enumeration(temperature):
    chosen = sample_experts(LOGITS.expand(DRAWS, N), gumbel(DRAWS, N), K, temperature)
    assert (chosen[:, 0] != chosen[:, 1]).all()
    probabilities = enumerated(temperature)
    code = (chosen * torch.tensor([N, 1])).sum(1)
    counts = torch.bincount(code, minlength=N * N)[ORDERED @ torch.tensor([N, 1])]
    assert counts.sum() == DRAWS
    assert p_value(counts, DRAWS * probabilities) > 0.01
    # Each expert is in the set with its own frequency; a wrong temperature is noticed.
    included = torch.stack([(chosen == expert).any(1).double().mean() for expert in range(N)])
    expected = torch.stack([probabilities[(expert == ORDERED).any(1)].sum() for expert in range(N)])
    assert expected.sum().item() == pytest.approx(K)
    torch.testing.assert_close(included, expected, rtol=0, atol=0.006)
    assert p_value(counts, DRAWS * enumerated(1.1 * temperature)) < 1e-6


@pytest.mark.parametrize("num_chosen", [1, 2, 4, 5])
def test_log_probability_is_that_of_enumeration(num_chosen):
    orders = torch.tensor(list(itertools.permutations(range(N), num_chosen)))
    found = log_probability(LOGITS.expand(len(orders), N), orders)
    torch.testing.assert_close(found.exp(), enumerated(num_chosen=num_chosen), rtol=1e-12, atol=0)
    found = log_probability(LOGITS.unsqueeze(0), orders.unsqueeze(1), torch.tensor([0.5], dtype=torch.float64))
    assert found.shape == (len(orders), 1)
    torch.testing.assert_close(found.squeeze(1).exp(), enumerated(0.5, num_chosen), rtol=1e-12, atol=0)
    assert torch.isfinite(log_probability(torch.tensor([[80.0, 0.0, -80.0]]), torch.tensor([[2, 0]]))).all()


@pytest.mark.parametrize("num_chosen", [2, 5])
def test_gradients(num_chosen):
    chosen = torch.stack([torch.randperm(N)[:num_chosen] for _ in range(3)])
    logits = torch.randn(3, N, dtype=torch.float64, requires_grad=True)
    temperature = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64, requires_grad=True)

    def everything(logits, temperature):
        return (
            log_probability(logits, chosen, temperature),
            gate_entropy(logits, temperature),
            tempered_divergence(logits, temperature),
        )

    assert torch.autograd.gradcheck(everything, (logits, temperature))


def test_no_expert_is_favoured_where_logits_are_equal():
    """One-hot samples would make ties of all experts but one, and the same ones would be chosen for most tokens."""
    chosen = sample_experts(torch.zeros(2000, 8), gumbel(2000, 8), 6)
    assert all(len(set(row)) == 6 for row in chosen.tolist())
    share = chosen[:, 1:].flatten().bincount(minlength=8) / 2000  # those after the first one
    assert share.max() < 0.7
    few = sample_experts(torch.zeros(2000, 16), gumbel(2000, 16), 4).flatten().bincount(minlength=16) / 2000
    assert few.max() <= 0.6
    one_hot = torch.nn.functional.gumbel_softmax(torch.zeros(2000, 16), hard=True).topk(4).indices
    assert (one_hot.flatten().bincount(minlength=16) / 2000).max() > 0.6


def test_low_temperature_chooses_as_without_noise():
    logits = torch.randn(200, 8, dtype=torch.float64)
    chosen = sample_experts(logits, gumbel(200, 8), 3, 1e-9)
    assert torch.equal(chosen, logits.topk(3).indices)
    # With untempered weights, that is the router without noise.
    weights = restrict(logits, chosen).softmax(-1).gather(-1, chosen)
    torch.testing.assert_close(weights, logits.topk(3).values.softmax(-1))


def test_all_experts_are_chosen_where_k_is_n():
    logits = torch.randn(10, N)
    chosen = sample_experts(logits, gumbel(4, 10, N), N)
    assert chosen.shape == (4, 10, N)
    assert torch.equal(chosen.sort(-1).values, torch.arange(N).expand(4, 10, N))
    assert torch.equal(restrict(logits.expand(4, 10, N), chosen), logits.expand(4, 10, N))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_frequencies_in_half_precision(dtype):
    logits = LOGITS.to(dtype)
    chosen = sample_experts(logits.expand(DRAWS, N), gumbel(DRAWS, N), K)
    expected = sample_experts(logits.double().expand(DRAWS, N), gumbel(DRAWS, N).double(), K)
    assert (chosen != expected).any(1).double().mean() < 1e-4
    assert log_probability(logits, chosen[:1]).dtype == gate_entropy(logits[None]).dtype == torch.float32


def test_a_temperature_for_each_token():
    logits, temperature = torch.randn(3, 4, dtype=torch.float64), torch.tensor([0.3, 1.0, 5.0], dtype=torch.float64)
    noise = gumbel(3, 4)
    rows = [sample_experts(logits[i : i + 1], noise[i : i + 1], 2, temperature[i].item()) for i in range(3)]
    assert torch.equal(sample_experts(logits, noise, 2, temperature), torch.cat(rows))
    one = torch.tensor(2.0)
    torch.testing.assert_close(gate_entropy(logits, one), gate_entropy(logits, 2.0))


def test_entropy_and_divergence_are_bounded():
    logits = 3 * torch.randn(50, 6, dtype=torch.float64)
    probabilities = logits.softmax(-1)
    for temperature in (1e-4, 0.05, 1.0, 20.0, 1e6):
        tempered = torch.distributions.Categorical(logits=logits / temperature)
        entropy, divergence = gate_entropy(logits, temperature), tempered_divergence(logits, temperature)
        torch.testing.assert_close(entropy, tempered.entropy(), rtol=1e-10, atol=1e-10)
        expected = torch.distributions.kl_divergence(tempered, torch.distributions.Categorical(probs=probabilities))
        torch.testing.assert_close(divergence, expected, rtol=1e-10, atol=1e-10)
        assert ((entropy >= -1e-12) & (entropy <= math.log(6) + 1e-12)).all()
        uniform_divergence = -math.log(6) - probabilities.log().mean(-1)
        bound = torch.maximum(-probabilities.max(-1).values.log(), uniform_divergence)
        assert ((divergence >= -1e-12) & (divergence <= bound + 1e-9)).all()
    torch.testing.assert_close(tempered_divergence(logits, 1.0), torch.zeros(50, dtype=torch.float64))
