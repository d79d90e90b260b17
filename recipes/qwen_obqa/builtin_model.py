"""The small model of the demonstration: a tiny Qwen2-MoE, pre-trained on a generated world.

Nothing is downloaded: `pretrain` trains a model of about 400 thousand weights on the facts of a generated task in about
a minute and caches the checkpoint, which loads like any published one, with `AutoModelForCausalLM.from_pretrained`.

Pre-training follows a curriculum, whose order matters. Statements of facts come first, with an auxiliary loss at the
output of the *first* layer: the second layer compares the choices with the value, and the last one looks up the
answer's letter, so a value that is decoded only at the top of the network comes too late to be used in a question. Then
come questions with a "yes" or "no" after every choice, which give four times the signal of one letter; without them the
letters are not learned in any reasonable time. The letters come last. Weight decay is strong, because a model with
large weights memorises the answers to the pre-training questions instead of looking them up among the facts, and then
does not generalise to other questions.
"""

import hashlib
import json
import logging
import os
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedTokenizerBase, Qwen2MoeConfig, Qwen2MoeForCausalLM

from bmoe_lightning.data.prompts import answer_token_ids, encode_prompts, get_prompt_format
from bmoe_lightning.data.questions import Question
from recipes.common.progress import step_progress
from recipes.qwen_obqa.builtin_task import TEXT_FORMS, Piece, TextForm, World, join_pieces
from recipes.qwen_obqa.saved_model import is_intact, save_model

logger = logging.getLogger(__name__)

RECIPE_VERSION = 1
"""Part of the cache key; increase it whenever the code below would train another model from the same settings."""

_IGNORED = -100


@dataclass(frozen=True)
class Lesson:
    """One phase of the pre-training curriculum: a mixture of the forms of a world's texts.

    Args:
        until: First step, counted from 0, that is no longer part of the phase.
        statements: Sampling weight of texts of the form `statements`.
        judged: Sampling weight of texts of the form `judged`.
        answered: Sampling weight of texts of the form `answered`.
    """

    until: int
    statements: float = 0.0
    judged: float = 0.0
    answered: float = 0.0


@dataclass(frozen=True)
class PretrainingSettings:
    """Hyper-parameters of the pre-training.

    Args:
        steps: Planned number of optimiser steps.
        max_steps: Step at which training stops if the target accuracy is not reached.
        batch_size: Number of texts in a batch.
        learning_rate: Peak learning rate of AdamW: linear warm-up, constant, linear decay.
        warmup_steps: Number of warm-up steps.
        decay_share: Share of the planned steps over which the learning rate decays.
        least_learning_rate: Final learning rate as a share of `learning_rate`; steps beyond the plan use it too.
        weight_decay: Weight decay of AdamW.
        gradient_clip: Largest norm of the gradient.
        lessons: Phases of the curriculum, in order.
        early_readout: Weight of the auxiliary loss, that of the statements at the first layer's output.
        target_accuracy: Accuracy on a sample of the pre-training questions at which training stops.
        least_accuracy: Lowest accuracy at `max_steps` that is accepted; below it an error is raised.
        check_every: Number of steps between two evaluations of the accuracy.
        sample_size: Number of questions in the sample.
    """

    steps: int = 600
    max_steps: int = 900
    batch_size: int = 64
    learning_rate: float = 4e-3
    warmup_steps: int = 50
    decay_share: float = 0.3
    least_learning_rate: float = 0.25
    weight_decay: float = 0.2
    gradient_clip: float = 1.0
    lessons: tuple[Lesson, ...] = (
        Lesson(until=100, statements=1.0),
        Lesson(until=300, statements=0.15, judged=0.7, answered=0.15),
        Lesson(until=900, statements=0.225, judged=0.1, answered=0.675),
    )
    early_readout: float = 0.5
    target_accuracy: float = 0.95
    least_accuracy: float = 0.7
    check_every: int = 50
    sample_size: int = 256

    def learning_rate_factor(self, step: int) -> float:
        """The learning rate at a step, counted from 0, as a share of the peak."""
        falling = (self.steps - step) / (self.decay_share * self.steps)
        return min(1.0, (step + 1) / self.warmup_steps) * min(1.0, max(self.least_learning_rate, falling))

    def draw_form(self, step: int, rng: random.Random) -> TextForm:
        """Sample the form of a text for a step, counted from 0."""
        lesson = next((lesson for lesson in self.lessons if step < lesson.until), self.lessons[-1])
        return rng.choices(TEXT_FORMS, [getattr(lesson, form) for form in TEXT_FORMS])[0]


def small_moe_config(vocab_size: int, *, layers: int = 3, hidden_size: int = 64, experts: int = 8) -> Qwen2MoeConfig:
    """Configuration of a tiny Qwen2-MoE: top-2 routing, experts as wide as the hidden state, four attention heads.

    Args:
        vocab_size: Size of the tokenizer's vocabulary.
        layers: Number of layers, all of them MoE layers.
        hidden_size: Width of the hidden state and of every expert, a multiple of 8.
        experts: Number of experts in a layer, at least 2.

    Raises:
        ValueError: If `hidden_size` is not a multiple of 8, or there are fewer than two experts.
    """
    if hidden_size % 8:
        raise ValueError(f"hidden_size={hidden_size} gives four heads no even width; choose a multiple of 8")
    if experts < 2:
        raise ValueError(f"experts={experts} is too few for top-2 routing; choose at least 2")
    return Qwen2MoeConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_experts=experts,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        moe_intermediate_size=hidden_size,
        shared_expert_intermediate_size=hidden_size,
        max_position_embeddings=256,
        # The embedding of a value that was looked up is then that of the same word among the choices.
        tie_word_embeddings=True,
        # The usual .02 suits far wider models; here the network would stay nearly linear for hundreds of steps.
        initializer_range=0.1,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
        use_cache=False,
    )


def pretrain(
    world: World,
    config: Qwen2MoeConfig | None = None,
    *,
    cache_dir: str | os.PathLike[str],
    settings: PretrainingSettings | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Path:
    """Pre-train a small model on a world, or find its checkpoint in the cache.

    The result depends on the arguments alone (and on the machine's rounding). Training runs on one thread, and the
    global random state and number of threads are restored. The checkpoint folder is written under a temporary name and
    renamed, so an interrupted run leaves no incomplete checkpoint.

    Args:
        world: World to train on.
        config: Configuration of the model; None for `small_moe_config` with the world's vocabulary.
        cache_dir: Parent of the checkpoint folders; created if missing.
        settings: Hyper-parameters; None for the defaults.
        seed: Seed of the initialisation and of the texts.
        progress: Whether to show a progress bar.

    Returns:
        A folder with the model and its tokenizer, as `save_pretrained` writes them, and `pretraining.json` with the
        numbers of steps and seconds and the accuracy.

    Raises:
        ValueError: If the vocabulary of the configuration is not that of the world.
        RuntimeError: If the accuracy after `settings.max_steps` steps is below `settings.least_accuracy`.
    """
    settings = settings or PretrainingSettings()
    tokenizer = world.tokenizer()
    config = config or small_moe_config(len(tokenizer))
    if config.vocab_size != len(tokenizer):
        raise ValueError(
            f"the configuration has a vocabulary of {config.vocab_size} words and the world one of {len(tokenizer)}; "
            "create the configuration with small_moe_config(len(world.tokenizer()))"
        )
    folder = Path(cache_dir) / f"small-moe-{_cache_key(world, config, settings, seed)}"
    if is_intact(folder):
        logger.info("Using the small model in %s.", folder)
        return folder
    with _one_thread():
        model, record = _Pretraining(world, config, tokenizer, settings, seed).run(progress=progress)
    save_model(folder, model, tokenizer, record)
    return folder


@dataclass(frozen=True)
class SmallModel:
    """The small model of a world, pre-trained once for each seed.

    Attributes:
        world: World that the model knows.
        cache_dir: Parent of the checkpoint folders.
        layers: Number of MoE layers.
    """

    world: World
    cache_dir: Path
    layers: int = 3

    def folder(self, seed: int, *, progress: bool = True) -> Path:
        """The checkpoint of a seed; see `pretrain`.

        Args:
            seed: Seed of the pre-training.
            progress: Whether to show a progress bar.
        """
        config = small_moe_config(len(self.world.tokenizer()), layers=self.layers)
        return pretrain(self.world, config, cache_dir=self.cache_dir, seed=seed, progress=progress)


@contextmanager
def _one_thread() -> Iterator[None]:
    # On a busy machine a second thread made a step seven to nine times as long. Sums also round differently for each
    # number of threads, and the sharp transition in learning would amplify that.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _cache_key(world: World, config: Qwen2MoeConfig, settings: PretrainingSettings, seed: int) -> str:
    # Sample texts are part of the key, so that a change of the world's wording invalidates the cache by itself.
    rng = random.Random(0)
    texts = [join_pieces(world.pretraining_text(form, rng)) for form in TEXT_FORMS for _ in range(100)]
    model = {name: value for name, value in config.to_dict().items() if name != "transformers_version"}
    key = {
        "version": RECIPE_VERSION,
        "world": asdict(world),
        "texts": texts,
        "words": sorted(world.tokenizer().get_vocab().items()),
        "model": model,
        "settings": asdict(settings),
        "seed": seed,
    }
    return hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()[:16]


class _Pretraining:
    """One training run: the model, the optimiser, the texts, and the questions for early stopping."""

    def __init__(
        self,
        world: World,
        config: Qwen2MoeConfig,
        tokenizer: PreTrainedTokenizerBase,
        settings: PretrainingSettings,
        seed: int,
    ) -> None:
        self.world = world
        self.settings = settings
        self.encoder = _PieceEncoder(tokenizer)
        self.rng = random.Random(f"pre-training {seed}")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model = Qwen2MoeForCausalLM(config)
        # Measured on a CPU at this size: eager takes 1.2 times, batched_mm 16 times as long.
        self.model.set_experts_implementation("grouped_mm")
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=settings.learning_rate,
            weight_decay=settings.weight_decay,
            betas=(0.9, 0.95),
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, settings.learning_rate_factor)
        sample = world.questions("pretraining")[: settings.sample_size]
        self.sample_ids, self.sample_answers, self.letters = _encode_questions(tokenizer, sample)

    def run(self, *, progress: bool) -> tuple[Qwen2MoeForCausalLM, dict[str, float]]:
        """Train; returns the model, in evaluation mode, and the statistics of the training."""
        settings = self.settings
        begin = time.perf_counter()
        accuracy, step = 0.0, 0
        with step_progress("Pre-training the small model", settings.steps, shown=progress) as advance:
            while step < settings.max_steps and accuracy < settings.target_accuracy:
                self._step(step)
                step += 1
                if step % settings.check_every == 0 or step == settings.max_steps:
                    accuracy = self._accuracy()
                    logger.debug("Step %d: %.3f of the questions right.", step, accuracy)
                advance(f"{accuracy:.0%} of the questions right" if accuracy else "")
        if accuracy < settings.target_accuracy:
            self._report_shortfall(accuracy)
        self.model.eval()
        self.model.set_experts_implementation("eager")
        return self.model, {
            "steps": step,
            "seconds": round(time.perf_counter() - begin, 1),
            "accuracy": accuracy,
        }

    def _report_shortfall(self, accuracy: float) -> None:
        settings = self.settings
        found = (
            f"after {settings.max_steps} steps the small model answers {accuracy:.0%} of the pre-training questions "
            f"correctly (target: {settings.target_accuracy:.0%}"
        )
        if accuracy < settings.least_accuracy:
            raise RuntimeError(f"{found}, minimum: {settings.least_accuracy:.0%}); try another seed or raise max_steps")
        logger.warning("%s), so results will be weaker; try another seed or raise max_steps", found)

    def _step(self, step: int) -> None:
        settings = self.settings
        texts = [
            self.world.pretraining_text(settings.draw_form(step, self.rng), self.rng)
            for _ in range(settings.batch_size)
        ]
        ids, targets, early = self.encoder.batch(texts)
        self.model.train()
        outputs = self.model.model(input_ids=ids, output_hidden_states=True)
        loss = self._loss(outputs.last_hidden_state, targets)
        if (early != _IGNORED).any():
            first = self.model.model.norm(outputs.hidden_states[1])
            loss = loss + settings.early_readout * self._loss(first, early)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), settings.gradient_clip)
        self.optimizer.step()
        self.schedule.step()

    def _loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        # Most positions have no target; dropping them before the head saves most of its cost.
        scored = targets[:, 1:] != _IGNORED
        return functional.cross_entropy(self.model.lm_head(hidden[:, :-1][scored]), targets[:, 1:][scored])

    @torch.no_grad()
    def _accuracy(self) -> float:
        self.model.eval()
        logits = self.model(input_ids=self.sample_ids, logits_to_keep=1).logits[:, -1, self.letters]
        return (logits.argmax(-1) == self.sample_answers).double().mean().item()


class _PieceEncoder:
    """Encodes pre-training texts as tensors."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.known: dict[str, list[int]] = {}

    def _encode(self, text: str) -> list[int]:
        if text not in self.known:
            self.known[text] = list(self.tokenizer(text)["input_ids"])
        return self.known[text]

    def batch(self, texts: Sequence[Sequence[Piece]]) -> tuple[Tensor, Tensor, Tensor]:
        """Encode texts, padded on the right, which causal attention never sees.

        Returns:
            Token ids `[B, T]`, targets `[B, T]` (the scored tokens, -100 elsewhere), and the targets `[B, T]` of
            statements alone.
        """
        rows = [[(token, piece.scored) for piece in text for token in self._encode(piece.text)] for text in texts]
        length = max(map(len, rows))
        ids = torch.zeros(len(rows), length, dtype=torch.int64)
        targets = torch.full((len(rows), length), _IGNORED)
        for place, row in enumerate(rows):
            tokens = torch.tensor([token for token, _ in row])
            ids[place, : len(row)] = tokens
            targets[place, : len(row)] = tokens.where(torch.tensor([scored for _, scored in row]), _IGNORED)
        # Only statements end in a piece without a target, the full stop.
        stated = torch.tensor([not text[-1].scored for text in texts])
        return ids, targets, targets.where(stated[:, None], _IGNORED)


def _encode_questions(
    tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question]
) -> tuple[Tensor, Tensor, Tensor]:
    prompts = [get_prompt_format("letters").render(question) for question in questions]
    ids = torch.tensor(encode_prompts(tokenizer, prompts))  # every question of a world has the same number of words
    answers = torch.tensor([question.answer for question in questions])
    return ids, answers, answer_token_ids(tokenizer, prompts[:1], len(questions[0].choices))
