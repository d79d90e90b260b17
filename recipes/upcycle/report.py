"""What an upcycling prints, and the model card."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import Qwen2MoeConfig

import bmoe_lightning
from bmoe_lightning.experts import ExpertLayer
from recipes.upcycle.comparison import Difference
from recipes.upcycle.settings import UpcycleSettings

SOURCES = {
    "sparse upcycling": "Komatsuzaki et al. 2022, https://arxiv.org/abs/2212.05055",
    "segments": "He et al. 2024, https://arxiv.org/abs/2410.07524",
    "partial re-initialisation": "Nakamura et al. 2025, https://arxiv.org/abs/2502.19261",
}


@dataclass(frozen=True)
class Summary:
    """Numbers of an upcycling.

    Attributes:
        dense_parameters: Parameters of the dense model, tied ones once.
        parameters: Parameters of the mixture of experts.
        active_parameters: Those that a token uses.
        layers: What `find_expert_layers` finds in the mixture of experts.
        num_layers: Number of its decoder layers.
        difference: Difference of the logits; None if they have not been compared.
        tokens: Tokens of the compared batch by router and expert; empty likewise.
    """

    dense_parameters: int
    parameters: int
    active_parameters: int
    layers: tuple[ExpertLayer, ...]
    num_layers: int
    difference: Difference | None
    tokens: Mapping[str, Tensor]

    def lines(self) -> list[str]:
        """The summary as text."""
        first, last = self.layers[0], self.layers[-1]
        lines = [
            f"Parameters: {self.dense_parameters:,} before, {self.parameters:,} after, of which a token uses "
            f"{self.active_parameters:,}.",
            f"Expert layers found: {len(self.layers)} of {self.num_layers} layers ({first.name} to {last.name}), "
            f"{first.num_experts} experts each, down_proj {first.d_out} x {first.d_in}.",
        ]
        if self.difference is None:
            return [*lines, "The logits have not been compared with those of the dense model (--no-compare)."]
        found = self.difference
        lines.append(
            f"Largest difference of a logit from the dense model's, in float32: {found.largest:.2g} (largest logit "
            f"{found.largest_logit:.3g}); Kullback-Leibler divergence of the next token {found.divergence:.2g} nats."
        )
        shares = torch.stack([counts / counts.sum() for counts in self.tokens.values()])
        lines.append(
            f"Share of the tokens of that batch that an expert gets: {100 * float(shares.min()):.1f} % to "
            f"{100 * float(shares.max()):.1f} %, {100 / shares.shape[1]:.1f} % on average."
        )
        return lines


def count_parameters(model: nn.Module) -> int:
    """Number of a model's parameters, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_active(total: int, layers: tuple[ExpertLayer, ...], config: Qwen2MoeConfig) -> int:
    """Number of the parameters that a token uses: all but the experts that it is not routed to."""
    unused = config.num_experts - config.num_experts_per_tok
    return total - len(layers) * unused * 3 * config.hidden_size * config.moe_intermediate_size


def record(settings: UpcycleSettings, summary: Summary) -> dict[str, Any]:
    """What the folder was made from, and how, in values that JSON has."""
    found = summary.difference
    options = {name: getattr(settings, name) for name in settings.__dataclass_fields__ if name != "output"}
    return {
        "made_from": options,
        "parameters": {
            "dense": summary.dense_parameters,
            "total": summary.parameters,
            "active": summary.active_parameters,
        },
        "expert_layers": [layer.name for layer in summary.layers],
        "difference": None if found is None else vars(found),
        "versions": {
            "bmoe_lightning": bmoe_lightning.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def model_card(settings: UpcycleSettings, summary: Summary) -> str:
    """The README.md of the folder: what it was made from, and how."""
    source = settings.model + (f" ({settings.gguf_file})" if settings.gguf_file else "")
    layers = f"{len(summary.layers)} of its {summary.num_layers} layers"
    how = [
        f"- The MLP of {layers} was copied {settings.experts} times, and a router sends each token to "
        f"{settings.top_k} of the copies. Their routing weights sum to one.",
        f"- The routers are drawn from a normal of standard deviation {settings.router_std} (seed {settings.seed}).",
        "- The shared expert, which the layout of Qwen2-MoE has in any case, has width 1 and weights that are zero; so "
        "have the biases of queries, keys and values where the dense model has none.",
    ]
    if settings.segments > 1:
        how.append(
            f"- Each copy is split along its hidden dimension into {settings.segments} experts, whose rows of the "
            f"router are equal; `down_proj` is multiplied by {settings.segments} ({SOURCES['segments']})."
        )
    if settings.noise:
        how.append(
            f"- Gaussian noise was added to the experts, {settings.noise} times the standard deviation of each matrix."
        )
    if settings.reinitialise:
        how.append(
            f"- {settings.reinitialise:.0%} of the hidden units of each expert were drawn anew "
            f"({SOURCES['partial re-initialisation']})."
        )
    start = (
        "It computes the function of the dense model, up to rounding, until it is trained further."
        if settings.is_exact
        else "Because the experts were made different, it is **not** the function of the dense model: train it."
    )
    return "\n".join(
        [
            "---",
            "library_name: transformers",
            "pipeline_tag: text-generation",
            "tags: [mixture-of-experts, upcycled]",
            "---",
            "",
            "# Upcycled mixture of experts",
            "",
            f"Made from the dense model `{source}` by sparse upcycling ({SOURCES['sparse upcycling']}) with "
            "`python -m recipes.upcycle` of bmoe_lightning. " + start + " The licence is that of the dense model.",
            "",
            *how,
            "",
            *(f"- {line}" for line in summary.lines()),
            "",
            "Options and numbers are in `upcycling.json`.",
            "",
        ]
    )
