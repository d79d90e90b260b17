"""Last-layer Laplace: a posterior over the language model's head only."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

from torch import nn

from bmoe_lightning.curvature.spec import Curvature, LayerSelection
from bmoe_lightning.experts import ExpertLayer, find_linear_layers
from bmoe_lightning.experts.wrappers.transformers import outermost_pretrained
from bmoe_lightning.methods.laplace_lpo import LaplaceLPO
from bmoe_lightning.methods.options import option


@dataclass(frozen=True)
class OutputHead(LayerSelection):
    """The head of a language model as a plain linear layer.

    Class logits depend only on the rows of the K answer tokens. All other rows of the head have zero gradients, so they
    stay at the prior and do not contribute to a covariance: the posterior is that over the K rows.

    Attributes:
        name: Shell-style pattern over module names; None is the output embeddings of the transformers model.
    """

    name: str | None = None

    def find(self, model: nn.Module) -> list[ExpertLayer]:
        """Find the head.

        Raises:
            ValueError: If the model has no head, or the head is not a linear layer.
        """
        # The weights of a head tied to the embeddings are linearised in the head only, as if they were a copy.
        return find_linear_layers(model, self.name or _head_name(model), allow_tied=True)


@dataclass(frozen=True)
class LaplaceLastLayer(LaplaceLPO):
    """Laplace posterior over the head's K answer rows, with K-FAC curvature; prior precision from validation NLL (LPO).

    Kristiadi, Hein and Hennig 2020, Being Bayesian, Even Just a Bit, Fixes Overconfidence in ReLU Networks. Gradients
    stop at the head, so the backward passes cost next to nothing.
    """

    name: str = "laplace_last_layer"
    label: str = "Last-layer Laplace"
    head: str | None = option(None, "Pattern over module names of the head; by default the model's output embeddings.")

    source = "https://arxiv.org/abs/2002.10118"
    cost = "one forward pass and K - 1 backward passes to the head's output"

    def with_defaults(self, curvature: Curvature) -> Self:
        """The method with its curvature, by default the run's, applied to the head."""
        given = self.curvature or curvature
        if isinstance(given.layers, OutputHead) and self.head is None:
            return replace(self, curvature=given)
        return replace(self, curvature=replace(given, layers=OutputHead(self.head), skip_layers=()))


def _head_name(model: nn.Module) -> str:
    names = {id(module): name for name, module in model.named_modules()}
    for pretrained in outermost_pretrained(model):
        head = pretrained.get_output_embeddings()
        if head is not None and id(head) in names:
            return names[id(head)]
    raise ValueError(
        f"{type(model).__name__} has no output embeddings known to transformers; name its last linear layer with "
        "head='pattern'"
    )
