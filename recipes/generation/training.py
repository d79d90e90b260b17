"""The small model of a task, trained on its answers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen2MoeForCausalLM

from recipes.common.progress import step_progress
from recipes.generation.tasks import WrittenQuestion
from recipes.qwen_obqa.builtin_model import small_moe_config

Batch = dict[str, Tensor]

_BATCH_SIZE = 64
_LEARNING_RATE = 4e-3


def text_batch(tokenizer: PreTrainedTokenizerFast, questions: Sequence[WrittenQuestion]) -> Batch:
    """Texts with their right answers as `bmoe_lightning.models.text_scores` takes them, padded on the left."""
    prompts = tokenizer([question.prompt for question in questions])["input_ids"]
    answers = tokenizer([question.answer for question in questions])["input_ids"]
    width = max(len(prompt + answer) for prompt, answer in zip(prompts, answers, strict=True))
    rows = [(width - len(p + a), p, a) for p, a in zip(prompts, answers, strict=True)]
    return {
        "input_ids": torch.tensor([[tokenizer.pad_token_id] * pad + p + a for pad, p, a in rows]),
        "attention_mask": torch.tensor([[0] * pad + [1] * len(p + a) for pad, p, a in rows]),
        "answer_mask": torch.tensor([[0] * (pad + len(p)) + [1] * len(a) for pad, p, a in rows]),
    }


def untrained_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> Qwen2MoeForCausalLM:
    """A tiny Qwen2-MoE with random weights."""
    config = small_moe_config(len(tokenizer), layers=2)
    config.eos_token_id, config.use_cache = tokenizer.eos_token_id, True
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen2MoeForCausalLM(config)


def train(
    model: Qwen2MoeForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    questions: Sequence[WrittenQuestion],
    *,
    steps: int,
    seed: int,
    progress: bool,
) -> None:
    """Train all weights of a model on the answers of questions, with AdamW and a linear decay.

    Args:
        model: The model; in evaluation mode afterwards.
        tokenizer: Its tokenizer.
        questions: Training questions.
        steps: Number of steps.
        seed: Seed of the order of the questions.
        progress: Whether to show a progress bar.
    """
    texts = text_batch(tokenizer, questions)
    labels = texts["input_ids"].masked_fill(texts["answer_mask"] == 0, -100)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=_LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    model.set_experts_implementation("grouped_mm")  # of the fastest forward and backward passes on a CPU
    model.train()
    with step_progress("Training the small model", steps, shown=progress) as advance:
        for _ in range(steps):
            chosen = torch.randint(len(labels), (_BATCH_SIZE,), generator=generator)
            mask = texts["attention_mask"][chosen]
            places = (mask.cumsum(1) - 1).clamp(min=0)
            loss = model(
                input_ids=texts["input_ids"][chosen], attention_mask=mask, position_ids=places, labels=labels[chosen]
            ).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            advance(f"loss {loss.item():.3f}")
    model.eval()
    model.set_experts_implementation("eager")
