"""The weights of routers, read from the model and compared with the logits that it makes."""

from __future__ import annotations

import pytest
import torch
from oracles.models import answer_logits, tiny_qwen, toy_batch, toy_model
from torch import nn

from bmoe_lightning.routers import check_linear, find_routers, intercepted_routers, router_weight


def seen_by(model):
    seen = {}

    def keep(router, u, logits):
        seen[router.index] = router, u, logits
        return logits

    with torch.no_grad(), intercepted_routers(model, find_routers(model), keep):
        answer_logits(model, toy_batch())
    return seen.values()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("make", [toy_model, tiny_qwen])
def test_the_weight_makes_the_logits(make, dtype):
    model = make().to(dtype)
    for router, u, logits in seen_by(model):
        weight = router_weight(model, router)
        assert weight.shape == (router.num_experts, router.d_in)
        assert not weight.requires_grad
        check_linear(router, weight, u, logits)
        check_linear(router, weight, u, logits + torch.arange(router.num_experts))  # a bias
        with pytest.raises(ValueError, match="are not its weight times its input"):
            check_linear(router, weight.flip(0), u, logits)
        with pytest.raises(ValueError, match="merge adapters"):
            check_linear(router, weight, u, logits + 0.1 * u @ torch.ones_like(weight).T)


def test_a_router_whose_matrix_is_not_known_is_refused():
    model = toy_model()
    router = find_routers(model)[0]
    linear = model.get_submodule(router.name)
    linear.other = nn.Parameter(torch.ones_like(linear.weight))
    with pytest.raises(ValueError, match="has 2 matrices of 4 x 6"):
        router_weight(model, router)
    del linear.other
    linear.weight = nn.Parameter(linear.weight.data.to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="has no matrices"):
        router_weight(model, router)
