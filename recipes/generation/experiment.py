"""Answers of the models of all tasks and seeds, with the scores of each answer; what is stored is not made again."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen2MoeForCausalLM

from bmoe_lightning.curvature import collect_text_factors
from bmoe_lightning.experts import find_expert_layers, squared_distances
from bmoe_lightning.experts.weights import down_proj_weights
from bmoe_lightning.laplace import LaplacePosterior, score_answers
from bmoe_lightning.models import GeneratedAnswers, generate_answers, sequence_log_prob
from bmoe_lightning.utils.safetensors_io import read_tensor_file, write_tensor_file
from recipes.generation.settings import GenerationSettings
from recipes.generation.tasks import WrittenQuestion, WrittenTask, make_task
from recipes.generation.training import text_batch, train, untrained_model

_FORMAT = "scored answers"
_VERSION = 1
_REMEDY = "delete it, and run the same command again"
_BATCH_SIZE = 100
_RIGHT, _SHOWN = "right", 4


@dataclass(frozen=True, eq=False)
class ScoredAnswers:
    """The answers of one model to the test questions of its task.

    Attributes:
        task: Name of the task.
        seed: Seed of the model.
        right: Whether each answer is right, `[N]`.
        scores: Uncertainties `[N]` by name, higher is more uncertain.
        description: What else is stored: options, seconds, prior precisions, and the first answers as text.
    """

    task: str
    seed: int
    right: Tensor
    scores: dict[str, Tensor]
    description: dict[str, Any]


def all_answers(settings: GenerationSettings) -> Iterator[ScoredAnswers]:
    """The scored answers of each task and seed.

    Raises:
        ValueError: If the folder has some that were made with other options, or a file is damaged.
    """
    for name in settings.tasks:
        for seed in range(settings.first_seed, settings.first_seed + settings.seeds):
            path = Path(settings.output_dir) / "answers" / f"{name}-{seed}.safetensors"
            if not path.is_file():
                print(f"{name}, seed {seed}", flush=True)
                tensors, description = _made(make_task(name, questions=settings.questions), settings, seed)
                write_tensor_file(path, tensors, format=_FORMAT, version=_VERSION, description=description)
            stored = read_tensor_file(path, format=_FORMAT, version=_VERSION, remedy=_REMEDY)
            if stored.description["options"] != settings.of_answers():
                raise ValueError(
                    f"{path} was made with other options ({stored.description['options']} instead of "
                    f"{settings.of_answers()}); choose another --output-dir, or delete it"
                )
            scores = {key: value for key, value in stored.tensors.items() if key != _RIGHT}
            yield ScoredAnswers(name, seed, stored.tensors[_RIGHT], scores, stored.description)


def _made(task: WrittenTask, settings: GenerationSettings, seed: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    begin = time.perf_counter()
    tokenizer = task.tokenizer()
    model = untrained_model(tokenizer, seed)
    layers = find_expert_layers(model)
    before = {name: weight.clone() for layer in layers for name, weight in down_proj_weights(model, layer).items()}
    train(model, tokenizer, task.train, steps=settings.steps, seed=seed, progress=not settings.quiet)
    writer = _Writer(model, tokenizer, task)
    texts = (
        (answers.batch for _, answers in writer.answered(task.train, temperature=1.0, seed=seed))
        if settings.fisher == "mc"
        else (text_batch(tokenizer, part) for part in _parts(task.train))
    )
    factors = collect_text_factors(model, sequence_log_prob, texts, rank=settings.rank, seed=seed)
    posterior = LaplacePosterior(factors).fit_prior_evidence(squared_distances(model, layers, before))
    found: dict[str, list[Tensor]] = {}
    written: list[str] = []
    for questions, answers in writer.answered(task.test):
        expected = tokenizer([question.answer for question in questions])["input_ids"]
        right = [one == other for one, other in zip(answers.tokens(), expected, strict=True)]
        scores = score_answers(model, answers.batch, posterior).uncertainties()
        for name, value in {**scores, _RIGHT: torch.tensor(right)}.items():
            found.setdefault(name, []).append(value)
        written += answers.text or ()
    shown = list(zip(task.test, written, strict=True))[:_SHOWN]
    return {name: torch.cat(values) for name, values in found.items()}, {
        "options": settings.of_answers(),
        "seconds": round(time.perf_counter() - begin, 1),
        "prior_precision": posterior.prior_precision.tolist(),
        "answers": [{"prompt": q.prompt, "answer": q.answer, "written": text} for q, text in shown],
    }


@dataclass(frozen=True)
class _Writer:
    model: Qwen2MoeForCausalLM
    tokenizer: PreTrainedTokenizerFast
    task: WrittenTask

    def answered(
        self, questions: Sequence[WrittenQuestion], *, temperature: float | None = None, seed: int = 0
    ) -> Iterator[tuple[Sequence[WrittenQuestion], GeneratedAnswers]]:
        """Questions with the model's answers, in batches; arguments are those of `generate_answers`."""
        longest = max(map(len, self.tokenizer([question.answer for question in self.task.train])["input_ids"]))
        for number, part in enumerate(_parts(questions)):
            prompts = self.tokenizer([question.prompt for question in part], padding=True, return_tensors="pt")
            yield (
                part,
                generate_answers(
                    self.model,
                    prompts,
                    max_new_tokens=longest + 1,  # so that an answer may be too long
                    temperature=temperature,
                    seed=seed + 1000 * number,
                    tokenizer=self.tokenizer,
                ),
            )


def _parts(questions: Sequence[WrittenQuestion]) -> Iterator[Sequence[WrittenQuestion]]:
    return (questions[begin : begin + _BATCH_SIZE] for begin in range(0, len(questions), _BATCH_SIZE))
