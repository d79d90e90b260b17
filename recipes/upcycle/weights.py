"""The weights of an upcycled model: pure functions from those of the dense one.

Shapes: hidden size `h`, width of the dense MLP `i`, `E` copies of it in `G` segments each, so `E G` experts of width
`i / G`. Expert `e G + g` is segment `g` of copy `e`.

The segments of a copy have equal rows in the router, so that with `top_k G` chosen experts a token uses all segments of
`top_k` copies, each with the routing weight of its copy divided by `G`. `down_proj` is multiplied by `G`, which is
exact for powers of two, so the sum over the segments is the copy's output ("virtual groups",
https://arxiv.org/abs/2410.07524).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import Qwen2MoeConfig

from recipes.upcycle.architecture import MLP
from recipes.upcycle.settings import UpcycleSettings


class Mlp(NamedTuple):
    """Weights of a gated MLP: `down(act(gate x) * up x)`.

    Attributes:
        gate: `[i, h]`.
        up: `[i, h]`.
        down: `[h, i]`.
    """

    gate: Tensor
    up: Tensor
    down: Tensor


def segments_of(mlp: Mlp, count: int) -> list[Mlp]:
    """Split an MLP into MLPs whose mean output is its output.

    Args:
        mlp: MLP of width `i`, which `count` divides.
        count: Number of segments, a power of two.

    Returns:
        MLPs of width `i / count`.
    """
    parts = zip(mlp.gate.chunk(count), mlp.up.chunk(count), mlp.down.chunk(count, dim=1), strict=True)
    return [Mlp(gate, up, down * count) for gate, up, down in parts]


def router_weight(config: Qwen2MoeConfig, segments: int, std: float, generator: torch.Generator) -> Tensor:
    """Weights of a router, `[E G, h]` float32, with equal rows for the segments of a copy."""
    rows = std * torch.randn(config.num_experts // segments, config.hidden_size, generator=generator)
    return rows.repeat_interleave(segments, dim=0)


def with_noise(mlp: Mlp, scale: float, generator: torch.Generator) -> Mlp:
    """Add Gaussian noise to each matrix.

    Args:
        mlp: MLP.
        scale: Standard deviation of the noise, as a fraction of the standard deviation of the matrix.
        generator: Source of the noise.
    """

    def noisy(weight: Tensor) -> Tensor:
        noise = torch.randn(weight.shape, generator=generator)
        return (weight.float() + scale * weight.float().std() * noise).to(weight.dtype)

    return Mlp(*map(noisy, mlp))


def partly_reinitialised(mlp: Mlp, fraction: float, generator: torch.Generator) -> Mlp:
    """Draw the weights of some hidden units anew (Drop-Upcycling, https://arxiv.org/abs/2502.19261).

    The units are the same in all three matrices; their new weights come from a normal with the mean and standard
    deviation of the weights that they replace, in each matrix.

    Args:
        mlp: MLP of width `i`.
        fraction: Fraction of the hidden units, rounded down.
        generator: Source of units and weights.
    """
    width = len(mlp.gate)
    units = torch.randperm(width, generator=generator)[: int(fraction * width)]
    if not len(units):
        return mlp

    def redrawn(weight: Tensor, dim: int) -> Tensor:
        old = weight.index_select(dim, units).float()
        new = old.mean() + old.std() * torch.randn(old.shape, generator=generator)
        return weight.index_copy(dim, units, new.to(weight.dtype))

    return Mlp(redrawn(mlp.gate, 0), redrawn(mlp.up, 0), redrawn(mlp.down, 1))


@dataclass(frozen=True)
class Upcycling:
    """The tensors of an upcycled model, one after the other, so that never all are in memory.

    Attributes:
        dense: What `recipes.upcycle.architecture.dense_tensors` returns.
        config: Configuration of the mixture of experts.
        settings: Options.
    """

    dense: Mapping[str, Tensor]
    config: Qwen2MoeConfig
    settings: UpcycleSettings

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Names, as in published Qwen2-MoE models (one matrix an expert), and tensors in the dense model's dtype."""
        config = self.config
        assert config.mlp_only_layers is not None
        generator = torch.Generator().manual_seed(self.settings.seed)
        moe_layers = [layer for layer in range(config.num_hidden_layers) if layer not in config.mlp_only_layers]
        for name, tensor in self.dense.items():
            found = MLP.fullmatch(name)
            if found is None or int(found["layer"]) not in moe_layers:
                yield name, tensor
        for layer in range(config.num_hidden_layers):
            yield from self._biases(f"model.layers.{layer}.self_attn")
        for layer in moe_layers:
            yield from self._expert_layer(f"model.layers.{layer}.mlp", generator)

    def _biases(self, attention: str) -> Iterator[tuple[str, Tensor]]:
        """Zero biases where the dense model has none."""
        for projection in ("q_proj", "k_proj", "v_proj"):
            if f"{attention}.{projection}.bias" not in self.dense:
                weight = self.dense[f"{attention}.{projection}.weight"]
                yield f"{attention}.{projection}.bias", weight.new_zeros(len(weight))

    def _expert_layer(self, name: str, generator: torch.Generator) -> Iterator[tuple[str, Tensor]]:
        settings = self.settings
        mlp = Mlp(*(self.dense[f"{name}.{matrix}.weight"] for matrix in ("gate_proj", "up_proj", "down_proj")))
        router = router_weight(self.config, settings.segments, settings.router_std, generator)
        yield f"{name}.gate.weight", router.to(mlp.gate.dtype)
        changed = self._change(generator)
        parts = segments_of(mlp, settings.segments)
        for expert in range(self.config.num_experts):
            made = changed(parts[expert % settings.segments])
            yield f"{name}.experts.{expert}.gate_proj.weight", made.gate
            yield f"{name}.experts.{expert}.up_proj.weight", made.up
            yield f"{name}.experts.{expert}.down_proj.weight", made.down
        hidden, width = self.config.hidden_size, self.config.shared_expert_intermediate_size
        yield f"{name}.shared_expert.gate_proj.weight", mlp.gate.new_zeros(width, hidden)
        yield f"{name}.shared_expert.up_proj.weight", mlp.gate.new_zeros(width, hidden)
        yield f"{name}.shared_expert.down_proj.weight", mlp.gate.new_zeros(hidden, width)
        yield f"{name}.shared_expert_gate.weight", mlp.gate.new_zeros(1, hidden)

    def _change(self, generator: torch.Generator) -> Callable[[Mlp], Mlp]:
        """What makes an expert different from the dense MLP."""
        settings = self.settings
        if settings.noise:
            return lambda mlp: with_noise(mlp, settings.noise, generator)
        if settings.reinitialise:
            return lambda mlp: partly_reinitialised(mlp, settings.reinitialise, generator)
        return lambda mlp: mlp
