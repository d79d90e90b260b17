"""Closed-form costs against a profiler, and against the percentages that papers print."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from bmoe_lightning.routers.costs import (
    RouterCost,
    diagonal_cost,
    dropout_cost,
    low_rank_cost,
    noise_cost,
    temperature_cost,
    triangular_cost,
    weights_cost,
)
from bmoe_lightning.routers.distribution import LowRankLogits, TriangularLogits, lower_triangular
from bmoe_lightning.routers.weight_noise import SwagWeights, dropout_multipliers

D, N, H, S, R, TOKENS = 32, 6, 8, 5, 3, 4
MODELS = {  # width, layers, experts, active multiply-adds: attention, experts, routers, dense layer, head
    "granite": (1536, 32, 40, 32 * (2 * 1536**2 + 2 * 1536 * 512 + 8 * 3 * 1536 * 512 + 40 * 1536) + 1536 * 49155),
    "qwen": (2048, 24, 60, 24 * (4 * 2048**2 + 3 * 2048 * (4 * 1408 + 5632) + 61 * 2048) + 2048 * 151936),
    "deepseek": (
        2048,
        28,
        64,
        28 * 4 * 2048**2 + 27 * (8 * 3 * 2048 * 1408 + 64 * 2048) + 3 * 2048 * 10944 + 2048 * 102400,
    ),
}


def counted(forward):
    """Multiply-adds per token of what a profiler sees: half of its floating-point operations."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        forward()
    return counter.get_total_flops() / 2 / TOKENS


def linear(d_in, d_out):
    return nn.Linear(d_in, d_out, bias=False)


INPUTS = torch.randn(TOKENS, D)


def head(width):
    """The shift of the mean, and the head of the scales."""
    return linear(D, N)(INPUTS), nn.Sequential(linear(D, H), nn.ReLU(), linear(H, width))(INPUTS)


def dropout():
    linear(D, N)(INPUTS * dropout_multipliers(torch.rand(S, TOKENS, D), 0.1))


def swag():
    weights = SwagWeights(torch.randn(N, D), torch.rand(N, D), torch.randn(2, N, D))
    sampled = weights.mean.expand(S, N, D)  # drawn before
    torch.einsum("snd,td->stn", sampled, INPUTS)


def mean_field():
    head(N)


def temperature():
    nn.Sequential(nn.Linear(D, H), nn.ReLU(), nn.Linear(H, 1))(INPUTS)


@pytest.mark.parametrize(
    ("forward", "cost"),
    [
        (dropout, dropout_cost(D, N, S)),
        (swag, weights_cost(D, N, S)),
        (mean_field, diagonal_cost(D, N, S, H)),
        (lambda: head(N * (N + 1) // 2), triangular_cost(D, N, S, H)),
        (lambda: head(N * (1 + R)), low_rank_cost(D, N, S, R, H)),
        (temperature, temperature_cost(D, N, H)),
    ],
)
def test_linear_layers_are_what_a_profiler_counts(forward, cost):
    assert counted(forward) == pytest.approx(cost.linear, rel=0.02)


def test_samples_of_matrices_are_what_a_profiler_counts():
    """It counts the zeros of a triangle too, and no product of single numbers."""
    mean, values = torch.zeros(TOKENS, N), torch.randn(TOKENS, N * (N + 1) // 2)
    noise = torch.randn(S, TOKENS, N + R)
    triangular = TriangularLogits(mean, lower_triangular(values))
    zeros = S * N * (N - 1) // 2
    assert counted(lambda: triangular.sample(noise[..., :N])) - zeros == triangular_cost(D, N, S, H).sampling
    low_rank = LowRankLogits(mean, torch.ones(N), torch.randn(TOKENS, N, R))
    assert counted(lambda: low_rank.sample(noise)) + S * N == low_rank_cost(D, N, S, R, H).sampling
    assert noise_cost(N, S) == RouterCost(0, S * N)
    assert diagonal_cost(D, N, S).sampling == S * N


PRINTED = {  # percent, ten routers and 35 samples: MC dropout, mean field, full covariance, temperature
    "granite": ("2.4", "0.76", "1.1", "0.67"),
    "qwen": ("1.8", "0.51", "0.9", "0.44"),
    "deepseek": ("1.7", "0.46", "0.9", "0.40"),
}


@pytest.mark.parametrize("model", PRINTED)
def test_percentages_that_are_printed(model):
    d_in, _, num_experts, active = MODELS[model]
    costs = (
        dropout_cost(d_in, num_experts, 34),  # there the samples replace the map of the trained router
        diagonal_cost(d_in, num_experts, 35),
        triangular_cost(d_in, num_experts, 35),
        temperature_cost(d_in, num_experts),
    )
    for cost, percent in zip(costs, PRINTED[model], strict=True):
        assert f"{100 * cost.share(10, active):.{len(percent) - 2}f}" == percent


@pytest.mark.parametrize(("model", "percent"), [("granite", "3.6"), ("qwen", "2.2"), ("deepseek", "2.5")])
def test_full_covariance_in_all_layers(model, percent):
    d_in, num_layers, num_experts, active = MODELS[model]
    share = triangular_cost(d_in, num_experts, 35).share(num_layers, active)
    assert f"{100 * share:.1f}" == percent
