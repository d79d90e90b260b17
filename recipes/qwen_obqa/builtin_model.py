"""The small model of the demonstration: a tiny Qwen2-MoE that has read a generated world.

Nothing is downloaded: `pretrain` teaches a model of about 400 thousand weights the facts of a generated task in about a
minute and keeps it in a cache folder, from which it is loaded like any published checkpoint, with
`AutoModelForCausalLM.from_pretrained`.

The order of the lessons matters. The facts come first, as statements, and the output of the *first* layer must already
tell them: a layer later the choices are compared with the value, and in the last one the answer's letter is looked up,
so a value known only at the top of the network comes too late to be used in a question. Then follow questions with a
"yes" or "no" after every choice, four times the signal of one letter, without which the letters are not learned in any
reasonable time. The letters themselves are learned last. Weight decay is strong, because a model that may keep large
weights learns the answers to the pre-training questions by heart instead of looking them up among the facts, and what
it has learned is then worth little for other questions.
"""

import hashlib
import json
import logging
import os
import random
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase, Qwen2MoeConfig, Qwen2MoeForCausalLM

from bmoe_lightning.data.prompts import answer_token_ids, encode_prompts, get_prompt_format
from bmoe_lightning.data.questions import Question
from recipes.qwen_obqa.builtin_task import TEXT_FORMS, Piece, TextForm, World, join_pieces

logger = logging.getLogger(__name__)

RECIPE_VERSION = 1
"""Part of the cache's key; raise it whenever the code below would train another model from the same settings."""

_IGNORED = -100


@dataclass(frozen=True)
class Lesson:
    """What is read up to some step of the pre-training.

    Args:
        until: the first step, counted from 0, that is no longer part of the lesson.
        statements: weight of the texts of this form, and so on for the other forms of a world's texts.
        judged: see ``statements``.
        answered: see ``statements``.
    """

    until: int
    statements: float = 0.0
    judged: float = 0.0
    answered: float = 0.0


@dataclass(frozen=True)
class PretrainingSettings:
    """How the small model is taught its world.

    Args:
        steps: planned optimiser steps.
        max_steps: where to stop if the target is not reached.
        batch_size: texts in a step.
        learning_rate: AdamW's learning rate, constant after the warm-up and falling linearly over the last part.
        warmup_steps: steps over which the learning rate rises.
        decay_share: share of the planned steps over which the learning rate falls.
        least_learning_rate: what it falls to, as a share of ``learning_rate``; steps beyond the plan stay there.
        weight_decay: AdamW's weight decay.
        gradient_clip: largest norm of the gradient.
        lessons: which texts are read, one lesson after the other.
        early_readout: weight of the statements' loss at the first layer's output, beside the usual one at the last.
        target_accuracy: training ends when this share of a sample of pre-training questions is answered rightly.
        least_accuracy: below this share, at ``max_steps``, the model is of no use and an error is raised.
        check_every: steps between two looks at that share.
        sample_size: questions in the sample.
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
        """Return the learning rate of a step, counted from 0, as a share of the highest."""
        falling = (self.steps - step) / (self.decay_share * self.steps)
        return min(1.0, (step + 1) / self.warmup_steps) * min(1.0, max(self.least_learning_rate, falling))

    def draw_form(self, step: int, rng: random.Random) -> TextForm:
        """Draw the form of a text for a step, counted from 0."""
        lesson = next((lesson for lesson in self.lessons if step < lesson.until), self.lessons[-1])
        return rng.choices(TEXT_FORMS, [getattr(lesson, form) for form in TEXT_FORMS])[0]


def small_moe_config(vocab_size: int, *, layers: int = 3, hidden_size: int = 64, experts: int = 8) -> Qwen2MoeConfig:
    """Return the configuration of a tiny Qwen2-MoE: top-2 routing, experts as wide as the hidden state, four heads.

    Args:
        vocab_size: size of the tokenizer's vocabulary.
        layers: number of layers, each with its own experts.
        hidden_size: width of the hidden state and of every expert, a multiple of 8.
        experts: experts in a layer, at least 2.

    Raises:
        ValueError: if ``hidden_size`` is not a multiple of 8 or there are fewer than two experts.
    """
    if hidden_size % 8:
        raise ValueError(f"hidden_size={hidden_size}: four heads of an even width need a multiple of 8.")
    if experts < 2:
        raise ValueError(f"experts={experts}: two experts are used for every token, so at least 2 are needed.")
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
        # A value that was looked up then points the way of the same word among the choices.
        tie_word_embeddings=True,
        # The usual .02 is meant for far wider models; here it leaves the network nearly linear for hundreds of steps.
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
    """Teach a small model a world, or find the one that was taught before.

    The result depends on the arguments alone (and on the machine's rounding); no global random state is changed, and
    one thread is used, whatever the setting outside. The
    cache folder is written under another name first, so an interrupted run leaves nothing behind that looks finished.

    Args:
        world: what to teach.
        config: the model; :func:`small_moe_config` for the world's vocabulary if not given.
        cache_dir: where checkpoint folders are kept; made if missing.
        settings: how to teach.
        seed: seed of the first weights and of the texts.
        progress: whether to show a progress bar.

    Returns:
        A folder with the model and its tokenizer, as ``save_pretrained`` writes them, and ``pretraining.json``, which
        tells the steps, seconds and accuracy.

    Raises:
        ValueError: if the configuration's vocabulary is not the world's.
        RuntimeError: if the model has not learned to answer after ``settings.max_steps`` steps.
    """
    settings = settings or PretrainingSettings()
    tokenizer = world.tokenizer()
    config = config or small_moe_config(len(tokenizer))
    if config.vocab_size != len(tokenizer):
        raise ValueError(
            f"the configuration has a vocabulary of {config.vocab_size} words and the world one of {len(tokenizer)}; "
            "make the configuration with small_moe_config(len(world.tokenizer()))."
        )
    folder = Path(cache_dir) / f"small-moe-{_cache_key(world, config, settings, seed)}"
    if folder.is_dir():
        logger.info("Using the small model in %s.", folder)
        return folder
    with _one_thread():
        model, record = _Pretraining(world, config, tokenizer, settings, seed).run(progress=progress)
    save_model(folder, model, tokenizer, record)
    return folder


@contextmanager
def _one_thread() -> Iterator[None]:
    # On a busy machine a second thread made a step seven to nine times as long. Sums also round differently with each
    # number of threads, which the sharp transition in learning would amplify.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _cache_key(world: World, config: Qwen2MoeConfig, settings: PretrainingSettings, seed: int) -> str:
    # Some texts stand for the code that makes them: whoever changes the world's wording need not think of the cache.
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


def save_model(
    folder: Path, model: Qwen2MoeForCausalLM, tokenizer: PreTrainedTokenizerBase, record: dict[str, float]
) -> None:
    """Write a checkpoint folder under another name first, so that an interrupted run leaves none that looks finished.

    Args:
        folder: where to; one that another process finished in the meantime is kept.
        model: what to save.
        tokenizer: its tokenizer.
        record: how the training went, for `pretraining.json`.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=folder.parent))
    try:
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        (unfinished / "pretraining.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        try:
            unfinished.replace(folder)
        except OSError:
            # Another process was quicker; its model is the same one.
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


class _Pretraining:
    """One run: the model, its optimiser, its texts and the questions that tell when it is done."""

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
        """Return the taught model, in evaluation mode, and a record of how it went."""
        settings = self.settings
        begin = time.perf_counter()
        accuracy, step = 0.0, 0
        with tqdm(total=settings.steps, desc="Pre-training the small model", unit="step", disable=not progress) as bar:
            while step < settings.max_steps and accuracy < settings.target_accuracy:
                self._step(step)
                step += 1
                if step % settings.check_every == 0 or step == settings.max_steps:
                    accuracy = self._accuracy()
                    logger.debug("Step %d: %.3f of the questions right.", step, accuracy)
                    bar.set_postfix_str(f"{accuracy:.0%} of the questions right")
                bar.total = max(step, settings.steps)
                bar.update()
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
            f"after {settings.max_steps} steps the small model answers {accuracy:.0%} of the pre-training questions, "
            f"{settings.target_accuracy:.0%} were aimed at"
        )
        if accuracy < settings.least_accuracy:
            raise RuntimeError(
                f"{found}, and below {settings.least_accuracy:.0%} it is of no use. "
                "Try another seed or raise max_steps."
            )
        logger.warning("%s; results will be weaker. Try another seed or raise max_steps.", found)

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
        # Most words are not scored; leaving them out first saves most of the work at the vocabulary.
        scored = targets[:, 1:] != _IGNORED
        return functional.cross_entropy(self.model.lm_head(hidden[:, :-1][scored]), targets[:, 1:][scored])

    @torch.no_grad()
    def _accuracy(self) -> float:
        self.model.eval()
        logits = self.model(input_ids=self.sample_ids, logits_to_keep=1).logits[:, -1, self.letters]
        return (logits.argmax(-1) == self.sample_answers).double().mean().item()


class _PieceEncoder:
    """Turns pre-training texts into tensors."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.known: dict[str, list[int]] = {}

    def _encode(self, text: str) -> list[int]:
        if text not in self.known:
            self.known[text] = list(self.tokenizer(text)["input_ids"])
        return self.known[text]

    def batch(self, texts: Sequence[Sequence[Piece]]) -> tuple[Tensor, Tensor, Tensor]:
        """Encode texts, padded on the right, which a causal model never looks at.

        Returns:
            `[B, T]` tokens; `[B, T]` scored tokens, ``-100`` elsewhere; `[B, T]` the same of statements alone.
        """
        rows = [[(token, piece.scored) for piece in text for token in self._encode(piece.text)] for text in texts]
        length = max(map(len, rows))
        ids = torch.zeros(len(rows), length, dtype=torch.int64)
        targets = torch.full((len(rows), length), _IGNORED)
        for place, row in enumerate(rows):
            tokens = torch.tensor([token for token, _ in row])
            ids[place, : len(row)] = tokens
            targets[place, : len(row)] = tokens.where(torch.tensor([scored for _, scored in row]), _IGNORED)
        # Statements alone end in a full stop, which is not scored.
        stated = torch.tensor([not text[-1].scored for text in texts])
        return ids, targets, targets.where(stated[:, None], _IGNORED)


def _encode_questions(
    tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question]
) -> tuple[Tensor, Tensor, Tensor]:
    prompts = [get_prompt_format("letters").render(question) for question in questions]
    ids = torch.tensor(encode_prompts(tokenizer, prompts))  # every question of a world has the same number of words
    answers = torch.tensor([question.answer for question in questions])
    return ids, answers, answer_token_ids(tokenizer, prompts[:1], len(questions[0].choices))
