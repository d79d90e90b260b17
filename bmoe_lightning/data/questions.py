"""Multiple-choice questions, and splits of them without leaks.

All reported results rely on two rules: questions that tune a prior precision or a temperature are neither trained on
nor reported on, and a question is never in two splits, whatever its spelling.
"""

import random
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field

from bmoe_lightning.utils.messages import described, shown

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_INVISIBLE = ("Zs", "Zl", "Zp", "Cc", "Cf")


@dataclass(frozen=True)
class Question:
    """One multiple-choice question.

    Args:
        id: Identifier, used in every message about the question.
        question: Text of the question.
        choices: Texts of the choices, in the order of their letters. A list is converted to a tuple.
        answer: Position of the right choice, counted from 0.
        passage: Text that the question is about, None if there is none.

    Raises:
        TypeError: If a text is not a string, `choices` is one string, or `answer` is not an integer.
        ValueError: If a text is empty or not valid Unicode, there are fewer than 2 or more than 26 choices, or `answer`
            is out of range.
    """

    id: str
    question: str
    choices: tuple[str, ...]
    answer: int
    passage: str | None = None

    def __post_init__(self) -> None:
        _check_is_sequence(self.id, self.choices)
        object.__setattr__(self, "choices", tuple(self.choices))
        _check_texts(self)
        if not 2 <= len(self.choices) <= len(LETTERS):
            raise ValueError(
                f"question {shown(self.id)} has {len(self.choices)} choices; 2 to {len(LETTERS)} are supported"
            )
        if isinstance(self.answer, bool) or not isinstance(self.answer, int):
            raise TypeError(
                f"question {shown(self.id)}: answer must be an integer position counted from 0, found "
                f"{described(self.answer)}"
            )
        if not 0 <= self.answer < len(self.choices):
            raise ValueError(
                f"question {shown(self.id)}: answer {self.answer} is outside its {len(self.choices)} choices; "
                "positions count from 0"
            )


def _check_is_sequence(identity: str, choices: object) -> None:
    # One string is a sequence too, and would pass as one choice a character.
    if isinstance(choices, str) or not isinstance(choices, Sequence):
        raise TypeError(f"question {shown(identity)}: choices must be a list of texts, found {described(choices)}")


def _check_texts(question: Question) -> None:
    named: list[tuple[str, object]] = [("id", question.id), ("question", question.question)]
    named += [(f"choice {LETTERS[i % 26]}", text) for i, text in enumerate(question.choices)]
    named += [] if question.passage is None else [("passage", question.passage)]
    for name, text in named:
        if not isinstance(text, str):
            raise TypeError(f"question {shown(question.id)}: {name} must be a text, found {described(text)}")
        if is_blank(text):
            raise ValueError(f"question {shown(question.id)}: {name} is empty; drop or repair the item")
        if not is_encodable(text):
            raise ValueError(f"question {shown(question.id)}: {name} is not valid Unicode; drop or repair the item")


def is_blank(text: str) -> bool:
    """Whether a text shows nothing: white space, control and format characters only.

    Args:
        text: Any text.
    """
    return all(unicodedata.category(character) in _INVISIBLE for character in text)


def is_encodable(text: str) -> bool:
    """Whether a text is valid Unicode: JSON can hold half a surrogate pair, which cannot be tokenized or written.

    Args:
        text: Any text.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def has_ambiguous_answer(question: Question) -> bool:
    """Whether another choice has the text of the right one, so that the label is arbitrary.

    Case, spaces and compatibility characters make no difference.

    Args:
        question: Any question.
    """
    texts = [" ".join(unicodedata.normalize("NFKC", choice).casefold().split()) for choice in question.choices]
    return texts.count(texts[question.answer]) > 1


@dataclass(frozen=True)
class Splits:
    """The three disjoint parts of a task.

    Args:
        train: Questions that the weights are trained on.
        calibration: Questions that prior precisions and temperatures are tuned on.
        test: Questions that are reported, and used for nothing else.
        calibration_in_train: Whether calibration questions are trained on too, by intent.
    """

    train: tuple[Question, ...]
    calibration: tuple[Question, ...]
    test: tuple[Question, ...]
    calibration_in_train: bool = field(default=False, kw_only=True)


def question_key(question: Question) -> str:
    """The normalised text of a question; questions with equal keys are duplicates.

    Compatibility characters, case, runs of white space and closing punctuation are normalised; anything inside the text
    is kept as it is, because `5 - 3` and `5 + 3` are different questions. A passage is part of the key: "Which of these
    is true?" is another question about another text. The choices are not: the same question with other distractors
    still leaks the answer.

    Args:
        question: Any question.
    """
    key = _levelled(question.question)
    return key if question.passage is None else f"{_levelled(question.passage)}\n{key}"


def _levelled(text: str) -> str:
    folded = unicodedata.normalize("NFKC", text).casefold()
    return re.sub(r"\s+", " ", folded).strip().rstrip(" .,:;?!") or folded.strip()


def choices_key(question: Question) -> frozenset[str]:
    """The normalised texts of a question's choices, without their order.

    Args:
        question: Any question.
    """
    return frozenset(_levelled(choice) for choice in question.choices)


def split_train(
    questions: Sequence[Question], fraction: float = 0.2, *, seed: int = 0
) -> tuple[tuple[Question, ...], tuple[Question, ...]]:
    """Set a seeded random part of the training questions aside for calibration.

    The split is stratified by the position of the answer, and questions with the same text (`question_key`) stay
    together, so no text is in both parts. Bayesian LoRA (https://arxiv.org/abs/2308.13111) takes the last 20 % in file
    order instead, which depends on the order of the file.

    Args:
        questions: Training questions.
        fraction: Share to set aside, strictly between 0 and 1.
        seed: Seed of the draw; the global random state is not used.

    Returns:
        `(fit, calibration)`, each in the order of `questions`; calibration holds `fraction` of them up to rounding and
        up to the size of the last group of equal texts in each stratum.

    Raises:
        ValueError: If `fraction` is outside (0, 1) or one side would be empty.
    """
    if not 0.0 < fraction < 1.0:
        raise ValueError(f"fraction is {fraction}; it must lie strictly between 0 and 1")
    groups: dict[str, list[int]] = {}
    for position, question in enumerate(questions):
        groups.setdefault(question_key(question), []).append(position)
    strata: dict[int, list[list[int]]] = {}
    for group in groups.values():
        strata.setdefault(questions[group[0]].answer, []).append(group)

    generator = random.Random(seed)
    chosen: set[int] = set()
    seen = 0
    for answer in sorted(strata):
        generator.shuffle(strata[answer])
        seen += sum(len(group) for group in strata[answer])
        # A cumulative target gives the right total even if each stratum alone would round to nothing.
        target = round(fraction * seen)
        for group in strata[answer]:
            if len(chosen) + len(group) <= target:
                chosen.update(group)
    if not chosen or len(chosen) == len(questions):
        raise ValueError(
            f"a fraction of {fraction} of {len(questions)} questions with {len(groups)} different texts leaves one "
            "side empty; give more questions or another fraction"
        )
    fit = tuple(question for position, question in enumerate(questions) if position not in chosen)
    calibration = tuple(question for position, question in enumerate(questions) if position in chosen)
    return fit, calibration


def draw(questions: Sequence[Question], limit: int | None, *, seed: int = 0) -> tuple[Question, ...]:
    """A seeded random choice of at most `limit` questions, in their order.

    Args:
        questions: Questions to choose from.
        limit: How many at most; None for all of them.
        seed: Seed of the draw; the global random state is not used.

    Raises:
        ValueError: If `limit` is below 1.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}; it must be at least 1")
    if limit is None or limit >= len(questions):
        return tuple(questions)
    positions = sorted(random.Random(seed).sample(range(len(questions)), limit))
    return tuple(questions[position] for position in positions)
