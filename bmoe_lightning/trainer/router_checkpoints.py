"""What a checkpoint says of Bayesian routers besides their weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from bmoe_lightning.routers.attached import BayesianRouters
from bmoe_lightning.routers.base import check_router_weights, rounded_router_fingerprints

ROUTERS_KEY = "bayesian_routers"
"""Key of the entry in checkpoints."""


def routers_entry(model: nn.Module, routers: BayesianRouters) -> dict[str, Any]:
    """The weights beside which Bayesian routers were trained, as hashes, and their prior. A collective, if sharded.

    Args:
        model: The model.
        routers: The Bayesian routers.
    """
    fingerprints = rounded_router_fingerprints(model, [net.router for net in routers.nets])
    return {"fingerprints": fingerprints, "prior": None if routers.prior is None else list(routers.prior)}


def read_routers_entry(model: nn.Module, routers: BayesianRouters, checkpoint: Mapping[str, Any]) -> None:
    """Check that a checkpoint's Bayesian routers were trained beside this model, and take over their prior.

    A collective, if sharded. A checkpoint that does not say so is not checked.

    Args:
        model: The model, with the weights that it is used with.
        routers: The Bayesian routers.
        checkpoint: The checkpoint.

    Raises:
        ValueError: If the weights of the model's routers are others.
    """
    entry = checkpoint.get(ROUTERS_KEY)
    if entry is None:
        return
    check_router_weights(model, [net.router for net in routers.nets], entry["fingerprints"])
    routers.prior = None if entry["prior"] is None else tuple(entry["prior"])


def stored_routers(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """Tensors of Bayesian routers that a checkpoint keeps apart from its state dict, by their names in the module."""
    return dict((checkpoint.get(ROUTERS_KEY) or {}).get("state", {}))
