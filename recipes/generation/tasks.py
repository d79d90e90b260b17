"""Generated tasks whose answers are several tokens, of which a small model gets some right and some wrong.

Every token is a word of a few characters, and every answer ends in a full stop, the end token.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from transformers import PreTrainedTokenizerFast

from bmoe_lightning.data import train_word_tokenizer

END = "."
_LETTERS = "bcdfghjklmnpqrstvwxz"
_SYLLABLES = [consonant + vowel for consonant in _LETTERS for vowel in "aeiou"]


@dataclass(frozen=True)
class WrittenQuestion:
    """A question with a written answer.

    Attributes:
        prompt: Prompt.
        answer: Right answer, end token included.
    """

    prompt: str
    answer: str


@dataclass(frozen=True)
class WrittenTask:
    """A generated task.

    Attributes:
        name: Name.
        train: Training questions; one may stand there several times.
        test: Test questions.
    """

    name: str
    train: tuple[WrittenQuestion, ...]
    test: tuple[WrittenQuestion, ...]

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """A tokenizer in which every word of the task is one token; padding is on the left."""
        texts = [text for question in (*self.train, *self.test) for text in (question.prompt, question.answer)]
        words = train_word_tokenizer(texts, max_vocab=1000, keep=(END,))
        return PreTrainedTokenizerFast(
            tokenizer_object=words.backend_tokenizer,
            pad_token=words.pad_token,
            unk_token=words.unk_token,
            eos_token=END,
            padding_side="left",
        )


def make_task(name: str, *, questions: int) -> WrittenTask:
    """Generate a task; the same arguments always give the same one.

    Args:
        name: `addition`, sums of numbers that the training questions do not have in this combination; or `recall`,
            codes of names, which the training questions state often, rarely or never.
        questions: Number of test questions.
    """
    return _TASKS[name](questions)


def _addition(questions: int) -> WrittenTask:
    pairs = list(itertools.product(range(100), repeat=2))
    random.Random("addition").shuffle(pairs)
    made = [WrittenQuestion(f"{_spaced(a)} + {_spaced(b)} =", f"{_spaced(a + b)} {END}") for a, b in pairs]
    return WrittenTask(
        "addition", tuple(made[questions : questions + min(3000, 8 * questions)]), tuple(made[:questions])
    )


def _recall(questions: int) -> WrittenTask:
    """Each name is stated a number of times that falls with its rank; many are stated once or never."""
    rng = random.Random("recall")
    names = rng.sample(list(itertools.product(_SYLLABLES, repeat=2)), questions)
    facts = [
        WrittenQuestion(f"{' '.join(name)} =", " ".join([*rng.choices(_LETTERS, k=rng.randint(2, 5)), END]))
        for name in names
    ]
    weights = [1 / (rank + 1) for rank in range(questions)]
    return WrittenTask("recall", tuple(rng.choices(facts, weights, k=2 * questions)), tuple(facts))


def _spaced(number: int) -> str:
    return " ".join(str(number))


_TASKS: Mapping[str, Callable[[int], WrittenTask]] = {"addition": _addition, "recall": _recall}
