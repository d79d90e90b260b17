"""Options that several methods with a Laplace posterior have, each with one default and one help text."""

from __future__ import annotations

from typing import Any

from bmoe_lightning.laplace.predictive import NUM_SAMPLES
from bmoe_lightning.methods.options import option


def scope_option() -> Any:
    """The scope of the prior precision, a `Scope`."""
    return option("layer", "Scope of the prior precision: one per layer (`layer`), or a single one (`global`).")


def prior_mean_option(what: str = "Prior mean") -> Any:
    """The prior mean, a `PriorMeanName`.

    Args:
        what: What it is the prior mean of, as the help text begins.
    """
    return option("pretrained", f"{what}: the weights before fine-tuning (`pretrained`), or `zero`.")


def link_option(*, prediction_only: bool = True) -> Any:
    """The link, a `LinkName`.

    Args:
        prediction_only: As in `option`.
    """
    text = "Link from logits to probabilities: `mc`, `isotropic`, `probit` or `laplace_bridge`."
    return option("mc", text, prediction_only=prediction_only)


def num_samples_option(*, prediction_only: bool = True) -> Any:
    """The number of Monte Carlo samples of the link.

    Args:
        prediction_only: As in `option`.
    """
    text = "Number of Monte Carlo samples per prediction."
    return option(NUM_SAMPLES, text, prediction_only=prediction_only)
