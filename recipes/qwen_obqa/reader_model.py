"""A small model for real questions: its own word tokenizer, and a short look at the training text.

It cannot know the answers (no model of this size does), but it is fine-tuned, over-confident and calibrated like any
other, which is what a run on real input without a download is for.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import Qwen2MoeForCausalLM

from bmoe_lightning.data import Question, get_prompt_format, train_word_tokenizer
from recipes.qwen_obqa.builtin_model import save_model, small_moe_config

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
    """Make a small model that has read questions with their right answers, as plain text.

    Args:
        questions: the training questions; no others may be read.
        folder: where model and tokenizer are kept; if it is there already, it is used as it is.
        steps: optimiser steps; 0 leaves the weights random.
        batch_size: texts in a step.
        learning_rate: of AdamW, falling linearly to zero.
        prompt: the prompt format whose words the tokenizer has to know.
        seed: of the first weights and of the order of the texts.
        progress: whether to show a progress bar, if there are steps.

    Returns:
        The folder, as `save_pretrained` writes it.
    """
    folder = Path(folder)
    if folder.is_dir():
        return folder
    form = get_prompt_format(prompt)
    tokenizer = train_word_tokenizer([form.render(question) for question in questions], max_vocab=MAX_VOCABULARY)
    texts = [f"{question.question} {question.choices[question.answer]}" for question in questions]
    rows = [torch.tensor(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = small_moe_config(len(tokenizer))
        config.max_position_embeddings = 512
        model = Qwen2MoeForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95))
    generator = torch.Generator().manual_seed(seed)
    hidden = not progress or steps == 0
    bar = tqdm(range(steps), desc="The small model reads the training questions", unit="step", disable=hidden)
    for step in bar:
        chosen = torch.randint(len(rows), (batch_size,), generator=generator).tolist()
        ids = torch.nn.utils.rnn.pad_sequence([rows[i] for i in chosen], batch_first=True, padding_value=-100)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * (1 - step / steps)
        # Padding is on the right, where a causal model never looks back from.
        loss = model(input_ids=ids.clamp(min=0), labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    save_model(folder, model.eval(), tokenizer, {"steps": steps})
    return folder
