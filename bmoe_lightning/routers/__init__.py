"""Routers of expert layers: find them in a model, and replace their logits while it runs."""

from bmoe_lightning.routers.discovery import find_routers, locate_routers
from bmoe_lightning.routers.interception import intercepted_routers
from bmoe_lightning.routers.types import Replace, Router, Score

__all__ = [
    "Replace",
    "Router",
    "Score",
    "find_routers",
    "intercepted_routers",
    "locate_routers",
]
