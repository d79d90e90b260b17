"""The ways of storing experts that the library knows, by name."""

from __future__ import annotations

import bmoe_lightning.experts.layouts.families  # noqa: F401  (registers its adapters)
from bmoe_lightning.experts.layouts.fused import FusedExperts
from bmoe_lightning.experts.layouts.modules import LinearLayer, ModuleExperts
from bmoe_lightning.experts.layouts.registered import AdaptedExperts
from bmoe_lightning.experts.types import Layout, LayoutName

LAYOUTS: dict[LayoutName, Layout] = {
    "fused": FusedExperts(),
    "adapted": AdaptedExperts(),
    "modules": ModuleExperts(),
    "linear": LinearLayer(),
}
