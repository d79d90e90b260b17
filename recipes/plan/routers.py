"""What random routers add to a model: counted operations, stored numbers and memory of each registered method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bmoe_lightning.methods.registry import get_method, method_names
from bmoe_lightning.methods.routing_cost import routing_cost
from bmoe_lightning.routers.scores import sample_chunks
from recipes.plan.architecture import Architecture
from recipes.plan.compute import Workload, active_macs
from recipes.plan.tables import mib, table

_FLOAT = 4
_HELD = 3
"""Arrays of the size of a chunk of samples that are held at a time: numbers, logits and scores."""


@dataclass(frozen=True)
class RouterPlan:
    """What a method with random routers adds to predictions of a model, on all of its layers.

    Attributes:
        method: Name of the method.
        passes: Number of forward passes of a prediction.
        share: Share of a pass's multiply-adds that the routers add.
        stored: Bytes of what is stored for the routers.
        transient: Bytes beyond those of a forward pass, while one router runs.
    """

    method: str
    passes: int
    share: float
    stored: int
    transient: int

    @property
    def forwards(self) -> float:
        """The operations of a prediction in forward passes of the model."""
        return self.passes * (1 + self.share)


def router_plans(model: Architecture, work: Workload) -> tuple[RouterPlan, ...]:
    """The plans of all registered methods that count what they take.

    Args:
        model: Sizes of the model.
        work: Batch.
    """
    found = []
    for method in map(get_method, method_names()):
        if not method.needs.routers:
            continue
        costs = [routing_cost(method, e.layer.d_out, e.layer.num_experts) for e in model.experts]
        if any(cost is None for cost in costs):
            continue
        counted = [cost for cost in costs if cost is not None]
        passes = max(cost.passes for cost in counted)
        samples = 1 if passes > 1 else getattr(method, "num_samples", 1)
        widest = max(experts.layer.num_experts for experts in model.experts)
        found.append(
            RouterPlan(
                method.name,
                passes,
                sum(cost.per_token.total for cost in counted) / active_macs(model),
                _FLOAT * sum(cost.parameters for cost in counted),
                _transient(work, widest, samples),
            )
        )
    return tuple(found)


def _transient(work: Workload, num_experts: int, num_samples: int) -> int:
    """Bytes of the largest chunk of samples of the logits of one router."""
    floats = work.positions * num_experts
    return _HELD * _FLOAT * floats * len(next(iter(sample_chunks(num_samples, floats))))


def routers_text(plans: Sequence[RouterPlan]) -> str:
    """The plans as a table; empty if there are none.

    Args:
        plans: The plans.
    """
    if not plans:
        return ""
    rows = [
        [
            plan.method,
            str(plan.passes),
            f"{100 * plan.share:.3f}",
            f"{plan.forwards:.3f}",
            mib(plan.stored),
            mib(plan.transient),
        ]
        for plan in plans
    ]
    header = ["random routers, all layers", "passes", "% of a pass", "x forward", "stored MiB", "batch MiB ~"]
    return "\n".join(
        [
            *table(header, rows),
            "~ estimated, beyond a forward pass. Methods with random routers that count their operations, with their "
            "default options;",
            "each route over which predictions are averaged costs a forward pass.",
        ]
    )
