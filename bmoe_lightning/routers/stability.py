"""How far the sets of chosen experts change: the Jaccard index of two passes over the same tokens, layer by layer.

As in https://arxiv.org/abs/2509.23830, with two floors beside it: the index of two sets at random, and J0, that of two
independent draws of a random router on the same input. Without J0, the index under noise measures the error of the
average over samples as well.

A set is a row of a matrix `[tokens, E]` bool, so that tokens may have different numbers of experts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from bmoe_lightning.experts.interception import intercepted_layers
from bmoe_lightning.experts.types import ExpertLayer
from bmoe_lightning.routers.token_rows import TokenWatch, watched_tokens

Choices = Mapping[str, Sequence[Tensor]]
"""By the name of the expert layer, the sets of its calls in their order, `[tokens, E]` bool, without padding."""


def as_sets(chosen: Tensor, num_experts: int) -> Tensor:
    """Sets `[..., E]` bool from indices `[..., K]`."""
    empty = torch.zeros(*chosen.shape[:-1], num_experts, dtype=torch.bool, device=chosen.device)
    return empty.scatter(-1, chosen, True)


def jaccard(one: Tensor, other: Tensor) -> Tensor:
    """The Jaccard index `|A and B| / |A or B|` of the sets of each token; 1 for two empty sets.

    Args:
        one: `[tokens, E]` bool.
        other: The same tokens in the other pass.

    Returns:
        `[tokens]` float64.
    """
    union = (one | other).sum(-1)
    return torch.where(union == 0, 1.0, (one & other).sum(-1).double() / union.clamp(min=1))


def chance_jaccard(num_experts: int, top_k: int) -> float:
    """The expected Jaccard index of two independent uniform sets of K of N experts."""
    sets = math.comb(num_experts, top_k)
    return sum(
        math.comb(top_k, common) * math.comb(num_experts - top_k, top_k - common) / sets * common / (2 * top_k - common)
        for common in range(top_k + 1)
    )


@contextmanager
def recorded_choices(model: nn.Module, layers: Sequence[ExpertLayer]) -> Iterator[Choices]:
    """Record which experts the tokens get while a model runs, whatever the family's rule is.

    Padding is left out by the attention mask of each call (see `watched_tokens`).

    Args:
        model: The model.
        layers: Some of its expert layers.

    Raises:
        RuntimeError: If a layer does not tell which token a slot belongs to, or the padding is not known; raised from
            within the model.
    """
    with watched_tokens(model, [layer.module_name for layer in layers]) as watch:
        taps = [_SetTap(layer, watch) for layer in layers]
        with intercepted_layers(model, layers, taps=taps):
            yield {layer.name: tap.calls for layer, tap in zip(layers, taps, strict=True)}


def jaccard_by_layer(one: Choices, other: Choices) -> dict[str, float]:
    """The mean Jaccard index over all tokens of two passes over the same data, for each layer.

    The passes may differ in noise on their input, in the samples of a random router (J0), or in its method.

    Args:
        one: Choices of the one pass.
        other: Choices of the other pass: the same layers, and the same tokens in the same order.

    Raises:
        ValueError: If layers or tokens differ, or there are none.
    """
    return {name: float(indices.mean()) for name, indices in jaccard_of_tokens(one, other).items()}


def jaccard_of_tokens(one: Choices, other: Choices) -> dict[str, Tensor]:
    """The Jaccard index of each token in two passes over the same data, `[tokens]` float64 for each layer.

    Args:
        one: Choices of the one pass.
        other: Choices of the other pass, see `jaccard_by_layer`.

    Raises:
        ValueError: If layers or tokens differ, or there are none.
    """
    if set(one) != set(other):
        raise ValueError(
            f"the passes recorded {len(one)} and {len(other)} expert layers that are not the same; record the same "
            "layers in both"
        )
    found = {}
    for name, calls in one.items():
        sizes, other_sizes = [len(call) for call in calls], [len(call) for call in other[name]]
        if sum(sizes) != sum(other_sizes) or not sum(sizes):
            raise ValueError(
                f"the passes recorded {sum(sizes)} and {sum(other_sizes)} tokens in {name!r}; run both over the same "
                "batches"
            )
        found[name] = jaccard(torch.cat(list(calls)), torch.cat(list(other[name])))
    return found


def susceptible_layers(indices: Mapping[str, float]) -> list[str]:
    """The third of the layers (rounded up) whose sets change most, in the order of the model.

    Args:
        indices: Mean Jaccard index under noise by layer, of the router that is not random.
    """
    lowest = sorted(indices, key=lambda name: indices[name])[: math.ceil(len(indices) / 3)]
    return [name for name in indices if name in lowest]


@dataclass
class _SetTap:
    """Collects the sets of experts of the tokens of one layer."""

    layer: ExpertLayer
    watch: TokenWatch
    calls: list[Tensor] = field(default_factory=list)

    def record(
        self, inputs: Tensor, experts: Tensor, outputs: Tensor, tokens: Tensor | None, num_tokens: int
    ) -> Tensor:
        if tokens is None:
            raise RuntimeError(
                f"the experts {self.layer.name!r} do not tell which token each of their inputs belongs to, so the sets "
                "of experts are not known; leave the layer out"
            )
        # Where every token goes to all experts, those that it did not choose get zeros.
        used = inputs.ne(0).any(1)
        sets = torch.zeros(num_tokens, self.layer.num_experts, dtype=torch.bool, device=experts.device)
        sets[tokens[used], experts[used]] = True
        self.calls.append(sets[self.watch.rows(num_tokens).mask.flatten().to(sets.device)].cpu())
        return outputs
