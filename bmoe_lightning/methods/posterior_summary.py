"""One line on a posterior: which experts it covers, from how many tokens, and what share of the trained weights."""

from __future__ import annotations

import math

import torch

from bmoe_lightning.curvature.gradient_share import GradientShare
from bmoe_lightning.experts.layouts.registry import PLAIN_LINEAR
from bmoe_lightning.laplace.posterior import LaplacePosterior


def posterior_summary(posterior: LaplacePosterior, share: GradientShare | None = None) -> str:
    """Describe a posterior in one line.

    For example: `posterior over 24 layers of 60 experts: 1440 of 1440 experts seen, 12 to 5310 routed tokens each
    (median 410); it covers 38 % of the trained weights' gradient (kappa 2.6 +- 0.1),
    where 1,048,576 weights were trained`.

    Args:
        posterior: Posterior of any prior precision.
        share: Share of the trained weights' gradient that it covers; None leaves it out.
    """
    factors = posterior.factors
    slots = torch.cat([layer.slots.double().cpu() for layer in factors.layers])
    described = {layer.name: layer for layer in factors.expert_layers}
    layouts = {described[layer.name].layout for layer in factors.layers if layer.name in described}
    noun = "weight matrices" if layouts == {PLAIN_LINEAR.name} else "experts"
    sizes = sorted({layer.num_experts for layer in factors.layers})
    count = f"{len(factors.layers)} layer{'s' * (len(factors.layers) > 1)}"
    if len(factors.layers) < len(factors.expert_layers):
        count = f"{len(factors.layers)} of {len(factors.expert_layers)} layers"
    if noun == "experts":
        count += f" of {sizes[0]} experts" if len(sizes) == 1 else f" of {sizes[0]} to {sizes[-1]} experts"
    seen = slots[slots > 0]
    line = f"posterior over {count}: {len(seen)} of {len(slots)} {noun} seen"
    if len(seen):
        low, high, middle = float(seen.min()), float(seen.max()), float(seen.quantile(0.5))
        line += f", {low:.0f} to {high:.0f} routed tokens each (median {middle:.0f})"
        if factors.num_examples != factors.num_examples_used:
            line += f", scaled from {factors.num_examples_used} to {factors.num_examples} examples"
    return line if share is None else f"{line}; {share_phrase(share)}"


def share_phrase(share: GradientShare) -> str:
    """A phrase such as `it covers 38 % of the trained weights' gradient (kappa 2.6), where 40 weights were trained`."""
    if share.share is None or share.kappa is None:
        return f"what it covers of the trained weights' gradient (kappa) is unknown: {share.reason}"
    known = f", where {trained_phrase(share)}" if share.num_trained else ""
    if math.isinf(share.kappa):
        return f"it covers none of the trained weights (kappa infinite){known}"
    error = f" +- {share.kappa_error:.2g}" if share.kappa_error else ""
    percent = 100 * share.share
    return f"it covers {percent:.3g} % of the trained weights' gradient (kappa {share.kappa:.3g}{error}){known}"


def trained_phrase(share: GradientShare) -> str:
    """A phrase that says which weights count as trained, such as `40,960 weights were trained`."""
    if share.is_assumed:
        return f"all {share.num_trained:,} weights that require gradients count as trained"
    return f"{share.num_trained:,} weights were trained"
