"""A generated open-book task, and the text from which a small model learns the facts behind it.

A *world* holds creatures with made-up names. Every creature is of a kind, and each feature (colour, food, ...) has a
usual value for every kind, one in summer and one in winter. A creature takes its kind's value or, with probability
``exception_rate``, one of its own; the kind's value is then among the distractors of its question. So a question can
be answered from what was read about the creature, or guessed, mostly rightly, from its kind: a model that guesses has
every reason to be sure, and is wrong at times.

What happens in summer is both stated and asked about in the pre-training text; what happens in winter is only stated
there. The task is to answer questions about the winter, after a few examples: the facts were read, how to use them is
new.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from transformers import PreTrainedTokenizerFast

from bmoe_lightning.data.prompts import PROMPT_NAMES, get_prompt_format
from bmoe_lightning.data.questions import LETTERS, Question
from bmoe_lightning.data.tokenizer import KEPT_WORDS, train_word_tokenizer

Split = Literal["fit", "calibration", "test", "pretraining"]
SPLITS: tuple[Split, ...] = ("fit", "calibration", "test", "pretraining")
TextForm = Literal["statements", "judged", "answered"]
TEXT_FORMS: tuple[TextForm, ...] = ("statements", "judged", "answered")

ASKED_SEASON = "summer"
READ_SEASON = "winter"

KINDS = (
    "bird", "fish", "beetle", "frog", "lizard", "moth", "snail", "spider",
    "bat", "crab", "fern", "moss", "mouse", "worm", "toad", "snake",
)  # fmt: skip
FEATURES: dict[str, tuple[str, ...]] = {
    "colour": ("red", "blue", "green", "yellow", "black", "white", "purple", "orange"),
    "food": ("seeds", "nectar", "leaves", "roots", "berries", "algae", "bark", "pollen"),
    "habitat": ("forest", "desert", "swamp", "river", "meadow", "cave", "reef", "tundra"),
    "call": ("whistle", "growl", "click", "hum", "squeak", "hiss", "rattle", "chirp"),
    "shelter": ("nest", "burrow", "hollow", "web", "hive", "mound", "crevice", "tunnel"),
    "enemy": ("hawk", "fox", "otter", "wolf", "heron", "weasel", "shark", "owl"),
}

STATEMENTS_PER_TEXT = 3
MEMBERSHIP_RATE = 0.2

_CONSONANTS = "bdfgklmnprstvz"
_VOWELS = "aeiou"
_MOST_CHOICES = min(len(values) for values in FEATURES.values())
# Questions are sentences to be completed, as many of OpenBookQA's are, so that what was learned from the statement can
# be used at the same word of the question.
_STEM = "The {season} {feature} of the {creature} is"
_MEMBERSHIP = "The {creature} is a"


@dataclass(frozen=True)
class Fact:
    """One line of the world's encyclopaedia.

    Args:
        creature: name of the creature.
        kind: the kind that it is of.
        season: when the fact holds.
        feature: what is told about the creature, ``"colour"`` for example.
        value: the creature's value.
        usual: the usual value of its kind; differs from ``value`` for an exception.
    """

    creature: str
    kind: str
    season: str
    feature: str
    value: str
    usual: str

    @property
    def stem(self) -> str:
        """The fact as a sentence that lacks its last word."""
        return _STEM.format(season=self.season, feature=self.feature, creature=self.creature)


@dataclass(frozen=True)
class Piece:
    """A stretch of a pre-training text.

    Args:
        text: one or more whole words.
        scored: whether the words are to be predicted from what stands before them.
    """

    text: str
    scored: bool = False


@dataclass(frozen=True)
class World:
    """A generated world: its facts, its questions, its texts and its tokenizer.

    Everything follows from the arguments: two worlds with equal arguments are equal in every word, in every process,
    and no random state outside the world is read or changed.

    Args:
        seed: seed of the world.
        kinds: number of kinds, 2 to 16.
        creatures_per_kind: number of creatures of each kind, at least 1.
        features: number of features, 1 to 6; each has two relations, its value in summer and in winter.
        exception_rate: probability that a creature's value is not its kind's.
        choices: choices of a question, 2 to 8.
        fit_items: number of questions in the ``"fit"`` split.
        calibration_items: number of questions in the ``"calibration"`` split; all that remain are the ``"test"`` split.

    Raises:
        ValueError: if an argument is outside the range above, or no question is left for testing.
    """

    seed: int = 0
    kinds: int = 12
    creatures_per_kind: int = 16
    features: int = 4
    exception_rate: float = 0.1
    choices: int = 4
    fit_items: int = 259
    calibration_items: int = 172

    def __post_init__(self) -> None:
        _check_range("kinds", self.kinds, 2, len(KINDS))
        # Names are two or three syllables: far more than these exist, so drawing new ones never gets stuck.
        _check_range("creatures_per_kind", self.creatures_per_kind, 1, 1000)
        _check_range("features", self.features, 1, len(FEATURES))
        _check_range("exception_rate", self.exception_rate, 0, 1)
        _check_range("choices", self.choices, 2, _MOST_CHOICES)
        questions = self.kinds * self.creatures_per_kind * self.features
        if min(self.fit_items, self.calibration_items) < 1 or self.fit_items + self.calibration_items >= questions:
            raise ValueError(
                f"fit_items={self.fit_items} and calibration_items={self.calibration_items} must be positive and leave "
                f"some of the world's {questions} questions for testing; lower them or add creatures or features."
            )

    def _random(self, purpose: str) -> random.Random:
        # A seed that is a string is hashed the same way in every process, and purposes stay independent of each other.
        return random.Random(f"world {self.seed}: {purpose}")

    @cached_property
    def kind_of(self) -> dict[str, str]:
        """Every creature's name, with its kind."""
        rng = self._random("creatures")
        kinds = rng.sample(KINDS, self.kinds)
        taken = {*KINDS, *FEATURES, *(value for values in FEATURES.values() for value in values)}
        kind_of: dict[str, str] = {}
        while len(kind_of) < self.kinds * self.creatures_per_kind:
            name = "".join(rng.choice(_CONSONANTS) + rng.choice(_VOWELS) for _ in range(rng.choice((2, 3))))
            name += rng.choice(_CONSONANTS) if rng.random() < 0.5 else ""
            if name not in taken and name not in kind_of:
                kind_of[name] = kinds[len(kind_of) % self.kinds]
        return kind_of

    @cached_property
    def facts(self) -> tuple[Fact, ...]:
        """Every creature's value of every feature, in both seasons."""
        rng = self._random("facts")
        facts = []
        for feature in rng.sample(sorted(FEATURES), self.features):
            values = FEATURES[feature]
            for season in (ASKED_SEASON, READ_SEASON):
                usual = {kind: rng.choice(values) for kind in dict.fromkeys(self.kind_of.values())}
                for creature, kind in self.kind_of.items():
                    value = usual[kind]
                    if rng.random() < self.exception_rate:
                        value = rng.choice([other for other in values if other != usual[kind]])
                    facts.append(Fact(creature, kind, season, feature, value, usual[kind]))
        return tuple(facts)

    @cached_property
    def _asked(self) -> tuple[Fact, ...]:
        return tuple(fact for fact in self.facts if fact.season == ASKED_SEASON)

    @cached_property
    def _splits(self) -> dict[str, tuple[Question, ...]]:
        rng = self._random("questions")
        questions = [self.ask(fact, rng) for fact in self.facts if fact.season == READ_SEASON]
        rng.shuffle(questions)
        calibration_end = self.fit_items + self.calibration_items
        asked = [self.ask(fact, rng) for fact in self._asked]
        rng.shuffle(asked)
        return {
            "fit": tuple(questions[: self.fit_items]),
            "calibration": tuple(questions[self.fit_items : calibration_end]),
            "test": tuple(questions[calibration_end:]),
            "pretraining": tuple(asked),
        }

    def questions(self, split: Split) -> tuple[Question, ...]:
        """Return the questions of one split, in a shuffled order that follows from the seed.

        Args:
            split: ``"fit"``, ``"calibration"`` or ``"test"``, one question for each fact that pre-training only states,
                no fact in two splits; or ``"pretraining"``, one for each fact that pre-training asks about.

        Raises:
            ValueError: if there is no such split.
        """
        if split not in SPLITS:
            raise ValueError(f"a world has no split {split!r}; choose from {', '.join(SPLITS)}.")
        return self._splits[split]

    def ask(self, fact: Fact, rng: random.Random) -> Question:
        """Ask about a fact. The usual value of the kind is always among the choices.

        Args:
            fact: a fact of this world.
            rng: draws the other distractors and the order.
        """
        temptation = [fact.usual] if fact.usual != fact.value else []
        others = [value for value in FEATURES[fact.feature] if value not in (fact.value, fact.usual)]
        choices = [fact.value, *temptation, *rng.sample(others, self.choices - 1 - len(temptation))]
        rng.shuffle(choices)
        return Question(
            id=f"{fact.season}-{fact.feature}-{fact.creature}",
            question=fact.stem,
            choices=tuple(choices),
            answer=choices.index(fact.value),
        )

    def pretraining_text(self, form: TextForm, rng: random.Random) -> tuple[Piece, ...]:
        """Draw one text from which to learn this world.

        Args:
            form: ``"statements"``, three sentences about facts of either season or about creatures' kinds, whose last
                words are scored; ``"answered"``, a question about a summer fact in the ``letters`` prompt with its
                answer's letter, which is scored; ``"judged"``, such a question with a scored yes or no after each
                choice.
            rng: source of every draw.

        Returns:
            The text in pieces, to be joined by spaces.

        Raises:
            ValueError: if there is no such form.
        """
        if form == "statements":
            sentences = (self._sentence(rng) for _ in range(STATEMENTS_PER_TEXT))
            return tuple(piece for sentence in sentences for piece in sentence)
        if form not in TEXT_FORMS:
            raise ValueError(
                f"there is no pre-training text of the form {form!r}; choose from {', '.join(TEXT_FORMS)}."
            )
        question = self.ask(rng.choice(self._asked), rng)
        if form == "judged":
            return _judged(question)
        return Piece(get_prompt_format("letters").render(question)), Piece(LETTERS[question.answer], scored=True)

    def _sentence(self, rng: random.Random) -> tuple[Piece, ...]:
        fact = rng.choice(self.facts)
        if rng.random() < MEMBERSHIP_RATE:
            return Piece(_MEMBERSHIP.format(creature=fact.creature)), Piece(fact.kind, scored=True), Piece(".")
        return Piece(fact.stem), Piece(fact.value, scored=True), Piece(".")

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """Make a tokenizer in which every word of this world, and of both prompt formats, is one token.

        White space is dropped, so ``" A"`` and ``"A"`` are the same token. Pads on the left.
        """
        questions = [self.ask(fact, self._random("tokenizer")) for fact in self.facts]
        texts = [get_prompt_format(name).render(question) for name in PROMPT_NAMES for question in questions[:1]]
        texts += [
            _MEMBERSHIP.format(creature=""),
            *self.kind_of,
            *self.kind_of.values(),
            *(question.question for question in questions),
        ]
        texts += [value for fact in self.facts for value in FEATURES[fact.feature]]
        words = train_word_tokenizer(texts, max_vocab=100_000, keep=(*KEPT_WORDS, *LETTERS[:_MOST_CHOICES]))
        # Only what is given at construction is saved with the tokenizer.
        return PreTrainedTokenizerFast(
            tokenizer_object=words.backend_tokenizer,
            pad_token=words.pad_token,
            unk_token=words.unk_token,
            padding_side="left",
        )


def _check_range(name: str, value: float, lowest: float, highest: float) -> None:
    if not lowest <= value <= highest:
        raise ValueError(f"{name}={value}: choose a value from {lowest} to {highest}.")


def _judged(question: Question) -> tuple[Piece, ...]:
    pieces = [Piece(f"{question.question} Choices")]
    for position, choice in enumerate(question.choices):
        pieces += [Piece(choice), Piece("yes" if position == question.answer else "no", scored=True)]
    return tuple(pieces)


def join_pieces(pieces: Sequence[Piece]) -> str:
    """Return a pre-training text as one string."""
    return " ".join(piece.text for piece in pieces)
