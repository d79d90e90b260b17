"""The weights of routers, for Bayesian routers that compute with them."""

from __future__ import annotations

from torch import Tensor, nn

from bmoe_lightning.experts.fsdp import full_tensor, reshard
from bmoe_lightning.experts.wrappers.accelerate import materialized
from bmoe_lightning.experts.wrappers.quantised import unusable
from bmoe_lightning.routers.types import Router

# Share of the logits: bfloat16 rounds .1 % of them away.
_TOLERANCE = 0.02


def router_weight(model: nn.Module, router: Router) -> Tensor:
    """The weight W of a router's linear map, `[N, D]`, detached. A collective, if it is sharded.

    What else a router does to its logits (a bias, an adapter) is not in it; `check_linear` measures whether that
    matters.

    Args:
        model: The model.
        router: One of its routers.

    Raises:
        ValueError: If the router has no matrix of this shape, or several.
    """
    reshard(model)
    shape = router.num_experts, router.d_in
    found: dict[int, Tensor] = {}
    for module in model.get_submodule(router.name).modules():
        for name, parameter in module.named_parameters(recurse=False):
            if tuple(parameter.shape) == shape and not unusable(parameter):
                found[id(parameter)] = materialized(module, name)
    if len(found) != 1:
        raise ValueError(
            f"the router {router.name!r} has {len(found) or 'no'} matrices of {shape[0]} x {shape[1]} whose values can "
            "be read, and dropout on its input needs the one that makes its logits; use a Bayesian router of another "
            "kind for this model"
        )
    (weight,) = found.values()
    return full_tensor(weight)


def check_linear(router: Router, weight: Tensor, u: Tensor, logits: Tensor) -> None:
    """Check that the logits of a router are those of its weight, and a bias at most.

    Args:
        router: The router.
        weight: Its weight, `[N, D]`; see `router_weight`.
        u: Inputs of its linear map, `[tokens, D]`.
        logits: What it made of them, `[tokens, N]`.

    Raises:
        ValueError: If there is more, such as an adapter or a normalisation of the weight.
    """
    found = logits.detach().double()
    rest = found - u.detach().double() @ weight.to(u.device).double().T
    # A bias is the same for all tokens.
    error = float((rest - rest.mean(0)).norm() / found.norm().clamp(min=1e-30))
    if error > _TOLERANCE:
        raise ValueError(
            f"the logits of the router {router.name!r} are not its weight times its input, but {error:.1%} of them "
            "are something else, such as an adapter; merge adapters, or use a Bayesian router of another kind for this "
            "model"
        )
