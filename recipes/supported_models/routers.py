"""Which routers of a family's tiny model are supported, and what they do."""

from __future__ import annotations

from collections import Counter

from bmoe_lightning.routers import Router, examine_routers, find_routers
from recipes.supported_models.tiny import TinyFamily


def routers_of(tiny: TinyFamily) -> tuple[str | None, str | None]:
    """What the routers do that are supported, in words, and the reason why others are not; None where there are none.

    Args:
        tiny: The family's tiny model; its routers are probed on the first batch.
    """
    try:
        routers = find_routers(tiny.model)
    except ValueError as error:
        return None, str(error)
    probed = examine_routers(tiny.model, routers, lambda: tiny.class_logits(tiny.model, tiny.batches[0])[0])
    supported = Counter(_words(found.router) for found in probed if found.refusal is None)
    refused = [found for found in probed if found.refusal is not None]
    if not refused:
        return "; ".join(supported), None
    words = "; ".join(f"{count} x {what}" for what, count in supported.items()) or None
    return words, f"{refused[0].router.name}: {refused[0].refusal}"


def _words(router: Router) -> str:
    """The score and the number of experts of a router."""
    score = "another score" if router.score == "other" else router.score
    return f"{score}, top {router.top_k}" if router.top_k is not None else f"{score}"
