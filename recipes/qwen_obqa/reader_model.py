"""A small model for real questions: a word-level tokenizer, and a short pre-training on the training questions.

A model of this size cannot know the answers, but fine-tuning makes it overconfident like any other, so that everything
can be run on real data without a download.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import Qwen2MoeForCausalLM

from bmoe_lightning.data import Question, get_prompt_format, train_word_tokenizer
from recipes.common.progress import step_progress
from recipes.qwen_obqa.builtin_model import small_moe_config
from recipes.qwen_obqa.saved_model import is_intact, save_model

MAX_VOCABULARY = 8000


def read_questions(
    questions: Sequence[Question],
    folder: str | os.PathLike[str],
    *,
    steps: int = 400,
    batch_size: int = 32,
    learning_rate: float = 2e-3,
    prompt: str = "instruction",
    seed: int = 0,
    progress: bool = True,
) -> Path:
    """Pre-train a small model on questions with their right answers, as plain text.

    Args:
        questions: Training questions; held-out ones must not be among them.
        folder: Folder of the checkpoint; an existing one is returned as it is.
        steps: Number of optimiser steps; 0 leaves the weights random.
        batch_size: Number of texts in a batch.
        learning_rate: Initial learning rate of AdamW, with a linear decay to zero.
        prompt: Prompt format whose words, and those of its answers, are in the tokenizer's vocabulary.
        seed: Seed of the initialisation and of the order of the texts.
        progress: Whether to show a progress bar, if there are steps.

    Returns:
        The folder, as `save_pretrained` writes it.
    """
    folder = Path(folder)
    if is_intact(folder):
        return folder
    form = get_prompt_format(prompt)
    known = [form.render(question) for question in questions]
    if form.cloze:
        known += [answer for question in questions for answer in form.answers(question)]
    tokenizer = train_word_tokenizer(known, max_vocab=MAX_VOCABULARY)
    texts = [f"{question.question} {question.choices[question.answer]}" for question in questions]
    rows = [torch.tensor(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = small_moe_config(len(tokenizer))
        config.max_position_embeddings = 512
        model = Qwen2MoeForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95))
    generator = torch.Generator().manual_seed(seed)
    description, shown = "Pre-training the small model on the questions", progress and steps > 0
    with step_progress(description, steps, shown=shown) as advance:
        for step in range(steps):
            chosen = torch.randint(len(rows), (batch_size,), generator=generator).tolist()
            ids = torch.nn.utils.rnn.pad_sequence([rows[i] for i in chosen], batch_first=True, padding_value=-100)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * (1 - step / steps)
            # No attention mask: padding is on the right, where causal attention never sees it.
            loss = model(input_ids=ids.clamp(min=0), labels=ids).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            advance(f"loss {loss.item():.3f}")
    save_model(folder, model.eval(), tokenizer, {"steps": steps})
    return folder
