"""The models and computations that are measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

from bmoe_lightning.curvature import KroneckerFactors, collect_factors
from bmoe_lightning.curvature.fisher import FisherName
from bmoe_lightning.curvature.sketch import SketchName
from bmoe_lightning.experts import (
    ClassLogits,
    ExpertLayer,
    down_proj_parameters,
    expert_parameters,
    find_expert_layers,
    tapped_batch,
)


@dataclass(frozen=True)
class Shape:
    """Sizes of a model with Qwen2-MoE's architecture, and of its batch.

    Attributes:
        hidden: Hidden width: d_out of `down_proj`.
        intermediate: Width of an expert: d_in of `down_proj`.
        layers: Number of MoE layers.
        experts: Number of experts of a layer.
        top_k: Number of experts that a token is routed to.
        examples: Number of examples of a batch.
        tokens: Number of tokens of an example.
        classes: Number of classes K.
        rank: Rank of the factors.
        dtype: Dtype of the weights.
        shared: Width of the shared expert.
        head: Width of an attention head.
        vocabulary: Size of the vocabulary.
    """

    hidden: int
    intermediate: int
    layers: int
    experts: int
    top_k: int
    examples: int
    tokens: int
    classes: int = 4
    rank: int = 10
    dtype: str = "float32"
    shared: int = 64
    head: int = 64
    vocabulary: int = 1000

    def __str__(self) -> str:
        return (
            f"hidden {self.hidden}, expert width {self.intermediate}, {self.layers} layers of {self.experts} experts "
            f"(top {self.top_k}), {self.examples} x {self.tokens} tokens, K = {self.classes}, rank {self.rank}, "
            f"{self.dtype}"
        )


@dataclass(frozen=True)
class Preset:
    """The sizes of a value of `--model-shape`.

    Attributes:
        main: Shape for all ratios.
        growth: Shape from which growth is measured.
        peers: Shape that is small enough for a materialised Jacobian.
        factor_peers: Shapes at which curvature factors are compared.
        tokens: Numbers of tokens along which growth is measured.
        examples: Numbers of examples, likewise.
        experts: Numbers of experts, likewise, at the same number of slots.
        ranks: Ranks, likewise.
        widths: Hidden widths, likewise; an expert is half as wide.
        class_counts: Values of K for which predictions are timed.
        predictive_bar: Upper bound of a prediction's time over its floor.
        head: Shape whose vocabulary is large beside its layers, in which the output embedding is timed.
        serving: Shape on which predictions are timed as they are served.
    """

    main: Shape
    growth: Shape
    peers: Shape
    factor_peers: tuple[Shape, ...]
    tokens: tuple[int, ...]
    examples: tuple[int, ...]
    experts: tuple[int, ...] = (8, 16, 32, 64, 128)
    ranks: tuple[int, ...] = (1, 4, 16, 64)
    widths: tuple[int, ...] = (64, 256, 1024, 2048)
    class_counts: tuple[int, ...] = (2, 4, 5)
    predictive_bar: float = 1.25
    head: Shape = Shape(576, 96, layers=1, experts=8, top_k=2, examples=8, tokens=64, vocabulary=49_152)
    serving: Shape = Shape(512, 352, layers=8, experts=16, top_k=4, examples=32, tokens=64)


_PEERS = Shape(256, 128, layers=2, experts=16, top_k=4, examples=8, tokens=32)
_FACTOR_PEERS = (
    _PEERS,
    Shape(512, 352, layers=2, experts=32, top_k=4, examples=8, tokens=64),
    Shape(1024, 704, layers=2, experts=32, top_k=4, examples=8, tokens=64),
)
_LARGE_FACTOR_PEERS = (*_FACTOR_PEERS, Shape(2048, 1408, layers=2, experts=60, top_k=4, examples=8, tokens=64))
PRESETS = {
    "default": Preset(
        Shape(512, 352, layers=3, experts=32, top_k=4, examples=8, tokens=128, shared=512),
        Shape(256, 128, layers=2, experts=16, top_k=4, examples=8, tokens=64),
        _PEERS,
        _FACTOR_PEERS,
        tokens=(64, 128, 256),
        examples=(8, 16, 32),
    ),
    "qwen1.5-moe": Preset(
        Shape(
            2048, 1408, layers=24, experts=60, top_k=4, examples=8, tokens=128, dtype="bfloat16", shared=5632,
            head=128, vocabulary=151_936,
        ),
        Shape(1024, 704, layers=4, experts=32, top_k=4, examples=16, tokens=256, dtype="bfloat16"),
        _PEERS,
        _LARGE_FACTOR_PEERS,
        tokens=(256, 512, 1024),
        examples=(16, 32, 64),
        predictive_bar=1.15,
        head=Shape(2048, 1408, layers=1, experts=60, top_k=4, examples=8, tokens=128, head=128, vocabulary=151_936),
        serving=Shape(
            2048, 1408, layers=24, experts=60, top_k=4, examples=8, tokens=128, dtype="bfloat16", shared=5632,
            head=128, vocabulary=151_936,
        ),
    ),
    "tiny": Preset(
        Shape(16, 12, layers=2, experts=4, top_k=2, examples=3, tokens=8, rank=2, shared=8, head=8, vocabulary=20),
        Shape(16, 12, layers=1, experts=4, top_k=2, examples=2, tokens=8, rank=2, shared=8, head=8, vocabulary=20),
        Shape(16, 12, layers=2, experts=4, top_k=2, examples=3, tokens=8, rank=2, shared=8, head=8, vocabulary=20),
        (Shape(16, 12, layers=2, experts=4, top_k=2, examples=3, tokens=8, rank=2, shared=8, head=8, vocabulary=20),),
        tokens=(8, 16),
        examples=(2, 4),
        experts=(4, 8),
        ranks=(1, 4),
        widths=(16, 32),
        class_counts=(2, 3),
        head=Shape(16, 16, layers=1, experts=4, top_k=2, examples=3, tokens=8, shared=8, head=8, vocabulary=40),
        serving=Shape(
            16, 12, layers=4, experts=4, top_k=2, examples=8, tokens=8, rank=2, shared=8, head=8, vocabulary=20,
        ),
    ),
}  # fmt: skip


@contextmanager
def _made_on(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Create parameters directly on a device in a dtype, since a large model may not fit into CPU memory first."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.random.fork_rng(), device:
            torch.manual_seed(0)
            yield
    finally:
        torch.set_default_dtype(before)


def build(shape: Shape, device: torch.device) -> nn.Module:
    """A model with random weights."""
    config = Qwen2MoeConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        moe_intermediate_size=shape.intermediate,
        shared_expert_intermediate_size=shape.shared,
        num_hidden_layers=shape.layers,
        num_attention_heads=max(1, shape.hidden // shape.head),
        num_key_value_heads=max(1, shape.hidden // shape.head),
        num_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
        max_position_embeddings=max(512, shape.tokens),
        use_cache=False,
    )
    with _made_on(device, getattr(torch, shape.dtype)):
        return Qwen2MoeForCausalLM(config).eval().requires_grad_(False)


class Workload:
    """A model, a batch, and the computations that are timed on them.

    Args:
        shape: Shape of the model and the batch.
        device: Device of both.
    """

    def __init__(self, shape: Shape, device: torch.device) -> None:
        self.shape = shape
        self.device = device
        self.model = build(shape, device)
        self.layers: list[ExpertLayer] = find_expert_layers(self.model)
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(shape.vocabulary, (shape.examples, shape.tokens), generator=generator)
        labels = torch.randint(2, (shape.examples,), generator=generator)
        self.batch = {"ids": ids.to(device), "labels": labels.to(device)}
        # A number instead would give the output embedding a slice that is not contiguous, which costs B times as much.
        self._last = torch.tensor([-1], device=device)

    @cached_property
    def _trained(self) -> dict[str, list[nn.Parameter]]:
        choices: dict[str, Callable[[nn.Module, ExpertLayer], dict[str, nn.Parameter]]] = {
            "experts": expert_parameters,
            "down_proj": down_proj_parameters,
        }
        return {
            part: [parameter for layer in self.layers for parameter in choose(self.model, layer).values()]
            for part, choose in choices.items()
        }

    def class_logits(self, classes: int | None = None) -> ClassLogits:
        """A function to the float32 logits of the first K tokens of the vocabulary, at the last position."""
        count = self.shape.classes if classes is None else classes

        def logits(model: Any, batch: Any) -> tuple[Tensor, Tensor]:
            found = model(input_ids=batch["ids"], use_cache=False, logits_to_keep=self._last).logits[:, -1, :count]
            return found.float(), batch["labels"]

        return logits

    def train(self, part: str) -> None:
        """Forward and backward pass of a training step with weight gradients, without the optimiser's step.

        Args:
            part: Trained weights, `experts` (all matrices of all experts) or `down_proj` (the second ones).
        """
        for parameter in self._trained["experts"]:
            parameter.requires_grad_(False)
        for parameter in self._trained[part]:
            parameter.requires_grad_(True)
        logits, labels = self.class_logits()(self.model, self.batch)
        nn.functional.cross_entropy(logits, labels).backward()  # type: ignore[arg-type]
        for parameter in self._trained[part]:
            parameter.grad = None
            parameter.requires_grad_(False)

    def forward(self, classes: int | None = None) -> None:
        """A plain forward pass."""
        with torch.no_grad():
            self.class_logits(classes)(self.model, self.batch)

    def floor(self, classes: int | None = None) -> None:
        """A forward pass with graph and K - 1 backward passes to the experts' outputs: the least for linearisation."""
        with tapped_batch(self.model, self.layers, self.class_logits(classes), self.batch) as tapped:
            for k in range(1, tapped.logits.shape[1]):
                weights = torch.zeros_like(tapped.logits)
                weights[:, k], weights[:, 0] = 1, -1
                tapped.taps.gradients(tapped.logits, weights)

    def collect(
        self, batches: Iterable[Any], fisher: FisherName = "mc", sketch: SketchName = "nystrom", rank: int | None = None
    ) -> KroneckerFactors:
        """A curvature pass."""
        rank = self.shape.rank if rank is None else rank
        return collect_factors(
            self.model, self.class_logits(), batches, rank=rank, fisher=fisher, sketch=sketch, layers=self.layers
        )

    def tensors(self) -> list[Tensor]:
        """All tensors that are allocated before anything is timed."""
        return [*self.model.parameters(), *self.model.buffers(), *self.batch.values()]


def along(preset: Preset) -> Iterator[tuple[str, int, Shape]]:
    """The shapes of the growth section: name of the axis, size, and shape."""
    base = preset.growth
    for tokens in preset.tokens:
        yield "tokens of an example", tokens, replace(base, tokens=tokens)
    for examples in preset.examples:
        yield "examples", examples, replace(base, examples=examples)
    for experts in preset.experts:
        yield "experts", experts, replace(base, experts=experts)
    for rank in preset.ranks:
        yield "rank", rank, replace(base, rank=rank)
    for width in preset.widths:
        yield "width d", width, replace(base, hidden=width, intermediate=width // 2, head=min(base.head, width))
