"""The ways of storing experts that the library knows, by name."""

from __future__ import annotations

import bmoe_lightning.experts.families  # noqa: F401  (registers its adapters)
from bmoe_lightning.experts.adapted import AdaptedExperts
from bmoe_lightning.experts.fused import FusedExperts
from bmoe_lightning.experts.layer import Layout, LayoutName
from bmoe_lightning.experts.modules import LinearLayer, ModuleExperts

LAYOUTS: dict[LayoutName, Layout] = {
    "fused": FusedExperts(),
    "adapted": AdaptedExperts(),
    "modules": ModuleExperts(),
    "linear": LinearLayer(),
}
