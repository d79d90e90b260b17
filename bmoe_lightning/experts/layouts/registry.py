"""The layouts that the library knows, by name, in the order in which they are tried."""

from __future__ import annotations

import bmoe_lightning.experts.layouts.families  # noqa: F401  (registers its adapters)
from bmoe_lightning.experts.layouts.fused import FusedExperts
from bmoe_lightning.experts.layouts.linear import LinearLayer
from bmoe_lightning.experts.layouts.modules import ModuleExperts
from bmoe_lightning.experts.layouts.registered import RegisteredExperts
from bmoe_lightning.experts.types import Layout

PLAIN_LINEAR = LinearLayer()

LAYOUTS: dict[str, Layout] = {
    layout.name: layout for layout in (FusedExperts(), RegisteredExperts(), ModuleExperts(), PLAIN_LINEAR)
}
