"""The logits of an upcycled model against those of the dense one, on a seeded batch of text."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeTopKRouter

TOLERANCE = 1e-4
"""Largest difference of two logits in float32, as a fraction of the largest logit, that rounding may explain."""

_SENTENCES = (
    "Plants turn sunlight, water and carbon dioxide into sugar and oxygen.",
    "The train to the coast leaves at half past seven and takes two hours.",
    "She closed the book, switched off the lamp and listened to the rain.",
    "A magnet attracts iron, but it does not attract copper or wood.",
    "Which of these is a renewable resource: coal, oil, wind or gas?",
    "He asked for 3 apples, 12 eggs and a loaf of bread, and paid in cash.",
    "When ice melts, the water that it turns into takes up less space.",
    "The committee will publish its report before the end of the year.",
    "for i in range(10): print(i * i)",
    "Birds migrate in autumn because food becomes scarce in the north.",
)

SAMPLE_TEXT = " ".join(_SENTENCES)
"""English sentences and a line of code."""


@dataclass(frozen=True)
class Difference:
    """How far the logits of two models are apart.

    Attributes:
        largest: Largest absolute difference of two logits.
        largest_logit: Largest absolute logit of the dense model.
        divergence: Mean Kullback-Leibler divergence of the next token's distribution from the dense model's, in nats.
    """

    largest: float
    largest_logit: float
    divergence: float

    @property
    def is_rounding(self) -> bool:
        """Whether rounding in float32 explains the difference."""
        return self.largest <= TOLERANCE * self.largest_logit


def text_batch(tokenizer: PreTrainedTokenizerBase, vocab_size: int, *, rows: int, length: int, seed: int) -> Tensor:
    """Token ids for a comparison: half of the rows are English sentences, half are random tokens.

    Args:
        tokenizer: Tokenizer of the model.
        vocab_size: Number of tokens that the model has embeddings for.
        rows: Number of rows, `B`.
        length: Number of tokens of each row, `T`; nothing is padded.
        seed: Seed of the order of the sentences, and of the random tokens.

    Returns:
        Token ids `[B, T]`.

    Raises:
        ValueError: If the tokenizer makes no tokens of the sentences, or makes some that the model does not know.
    """
    generator = torch.Generator().manual_seed(seed)
    batch = torch.randint(vocab_size, (rows, length), generator=generator)
    for row in range((rows + 1) // 2):
        order = torch.randperm(len(_SENTENCES), generator=generator).tolist()
        ids = tokenizer(" ".join(_SENTENCES[i] for i in order), add_special_tokens=False)["input_ids"]
        if not ids or max(ids) >= vocab_size:
            raise ValueError(
                f"the tokenizer does not fit the model: it makes {len(ids)} tokens of some English sentences, with ids "
                f"up to {max(ids, default=0)}, and the model has {vocab_size}; are its files complete?"
            )
        batch[row] = torch.tensor((ids * length)[:length])
    return batch


@torch.no_grad()
def logits_of(model: PreTrainedModel, batch: Tensor) -> Tensor:
    """Logits `[B, T, V]` of a model, row by row."""
    return torch.cat([model(input_ids=row[None], use_cache=False).logits for row in batch])


def difference(dense: Tensor, moe: Tensor) -> Difference:
    """Compare logits `[B, T, V]` of the dense model and of the mixture of experts."""
    divergences = []
    largest = 0.0
    for expected, found in zip(dense.double(), moe.double(), strict=True):
        largest = max(largest, float((found - expected).abs().max()))
        log_p, log_q = expected.log_softmax(-1), found.log_softmax(-1)
        divergences.append((log_p.exp() * (log_p - log_q)).sum(-1))
    return Difference(largest, float(dense.abs().max()), float(torch.cat(divergences).mean()))


@contextmanager
def tokens_per_expert(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Count, within the context, the tokens that each router sends to each expert.

    Yields:
        Counts `[E]` by name of the router.
    """
    counts: dict[str, Tensor] = {}

    def count(name: str, router: Qwen2MoeTopKRouter, chosen: Tensor) -> None:
        counts[name] = counts.get(name, 0) + torch.bincount(chosen.flatten(), minlength=router.num_experts)

    routers = {name: module for name, module in model.named_modules() if isinstance(module, Qwen2MoeTopKRouter)}
    handles = [
        router.register_forward_hook(lambda module, _, output, name=name: count(name, module, output[2]))
        for name, router in routers.items()
    ]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()
