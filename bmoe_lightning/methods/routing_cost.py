"""What predictions with random routers take, counted in closed form."""

from __future__ import annotations

from bmoe_lightning.methods.base import Method
from bmoe_lightning.routers.costs import RoutingCost


def routing_cost(method: Method, d_in: int, num_experts: int) -> RoutingCost | None:
    """The counted cost of a prediction; None if the method replaces no router logits, or does not count.

    A method counts by a function `routing_cost(d_in, num_experts) -> RoutingCost` of its own.

    Args:
        method: The method.
        d_in: Width of a router's input.
        num_experts: Number of its logits.
    """
    count = getattr(method, "routing_cost", None)
    if count is None:
        return None
    found = count(d_in, num_experts)
    if not isinstance(found, RoutingCost):
        raise TypeError(f"routing_cost of {method.name} must return a RoutingCost, got {type(found).__name__}")
    return found
