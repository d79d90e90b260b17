"""A synthetic open-book task, and the pre-training text that states its facts.

A *world* holds creatures with made-up names. Every creature is of a kind, and each feature (colour, food, ...) has a
usual value for every kind, one in summer and one in winter. A creature has the value of its kind or, with probability
`exception_rate`, another one; the kind's value is then among the distractors of its question. So a question can be
answered from the facts about the creature, or guessed, mostly correctly, from its kind: a model that guesses is
confident for good reason, and sometimes wrong.

Facts about the summer are both stated and asked about in the pre-training text; facts about the winter are only stated.
The task is to answer questions about the winter after a few examples: the facts are known, and using them is new.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from transformers import PreTrainedTokenizerFast

from bmoe_lightning.data.prompts import get_prompt_format
from bmoe_lightning.data.questions import LETTERS, Question
from bmoe_lightning.data.tokenizer import KEPT_WORDS, train_word_tokenizer

Split = Literal["fit", "calibration", "test", "pretraining"]
# Named, since a further prompt format would change the vocabulary, and with it the pre-trained model.
PROMPTS = ("letters", "instruction")
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
# Questions are sentences to be completed, as many of OpenBookQA's are, so that a fact is recalled at the same word in
# its statement and in its question.
_STEM = "The {season} {feature} of the {creature} is"
_MEMBERSHIP = "The {creature} is a"


@dataclass(frozen=True)
class Fact:
    """One fact of a world.

    Args:
        creature: Name of the creature.
        kind: Kind of the creature.
        season: Season in which the fact holds.
        feature: Feature that the fact is about, such as `colour`.
        value: Value of the creature.
        usual: Usual value of its kind; differs from `value` for an exception.
    """

    creature: str
    kind: str
    season: str
    feature: str
    value: str
    usual: str

    @property
    def identifier(self) -> str:
        """Text that identifies the fact, and the id of its questions."""
        return f"{self.season}-{self.feature}-{self.creature}"

    @property
    def is_exception(self) -> bool:
        """Whether the creature's value is not that of its kind."""
        return self.value != self.usual

    @property
    def stem(self) -> str:
        """The fact as a sentence without its last word, the value."""
        return _STEM.format(season=self.season, feature=self.feature, creature=self.creature)


@dataclass(frozen=True)
class Piece:
    """A part of a pre-training text.

    Args:
        text: One or more words.
        scored: Whether the words are targets of the loss.
    """

    text: str
    scored: bool = False


@dataclass(frozen=True)
class World:
    """A generated world: its facts, its questions, its texts and its tokenizer.

    Worlds with equal arguments are equal in every word and in every process; no global random state is read or changed.

    Args:
        seed: Seed of the world.
        kinds: Number of kinds, 2 to 16.
        creatures_per_kind: Number of creatures of each kind, at least 1.
        features: Number of features, 1 to 6; each has two relations, its value in summer and in winter.
        exception_rate: Probability that a creature's value is not its kind's.
        choices: Number of choices of a question, 2 to 8.
        fit_items: Number of questions in the `fit` split.
        calibration_items: Number of questions in the `calibration` split; the rest are the `test` split.

    Raises:
        ValueError: If an argument is out of range, or no question is left for testing.
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
        # Far more names of two or three syllables exist than this, so drawing unused ones always ends.
        _check_range("creatures_per_kind", self.creatures_per_kind, 1, 1000)
        _check_range("features", self.features, 1, len(FEATURES))
        _check_range("exception_rate", self.exception_rate, 0, 1)
        _check_range("choices", self.choices, 2, _MOST_CHOICES)
        questions = self.kinds * self.creatures_per_kind * self.features
        if min(self.fit_items, self.calibration_items) < 1 or self.fit_items + self.calibration_items >= questions:
            raise ValueError(
                f"fit_items={self.fit_items} and calibration_items={self.calibration_items} must be positive and leave "
                f"some of the world's {questions} questions for testing; lower them or add creatures or features"
            )

    def _random(self, purpose: str) -> random.Random:
        # A string seed is hashed the same way in every process, and gives each purpose an independent stream.
        return random.Random(f"world {self.seed}: {purpose}")

    @cached_property
    def kind_of(self) -> dict[str, str]:
        """The kind of every creature, by name."""
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
        """The value of every feature of every creature, in both seasons."""
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
        """The questions of one split, shuffled with the seed.

        Args:
            split: Split `fit`, `calibration` or `test`, with one question for each fact that pre-training only states
                and no fact in two splits; or `pretraining`, with one for each fact that pre-training asks about.

        Raises:
            ValueError: If there is no such split.
        """
        if split not in SPLITS:
            raise ValueError(f"a world has no split {split!r}; choose from {', '.join(SPLITS)}")
        return self._splits[split]

    def ask(self, fact: Fact, rng: random.Random) -> Question:
        """Turn a fact into a question. The usual value of the kind is always among the choices.

        Args:
            fact: Fact of this world.
            rng: Generator of the other distractors and of the order.
        """
        temptation = [fact.usual] if fact.usual != fact.value else []
        others = [value for value in FEATURES[fact.feature] if value not in (fact.value, fact.usual)]
        choices = [fact.value, *temptation, *rng.sample(others, self.choices - 1 - len(temptation))]
        rng.shuffle(choices)
        return Question(
            id=fact.identifier,
            question=fact.stem,
            choices=tuple(choices),
            answer=choices.index(fact.value),
        )

    def pretraining_text(self, form: TextForm, rng: random.Random) -> tuple[Piece, ...]:
        """Sample one pre-training text.

        Args:
            form: Form of the text: `statements`, three sentences about facts of either season or about creatures'
                kinds, whose last words are scored; `answered`, a question about a summer fact in the `letters` prompt
                with the letter of its answer, which is scored; or `judged`, such a question with a scored yes or no
                after each choice.
            rng: Generator of all samples.

        Returns:
            The pieces of the text, to be joined by spaces.

        Raises:
            ValueError: If there is no such form.
        """
        if form == "statements":
            sentences = (self._sentence(rng) for _ in range(STATEMENTS_PER_TEXT))
            return tuple(piece for sentence in sentences for piece in sentence)
        if form not in TEXT_FORMS:
            raise ValueError(f"there is no pre-training text of the form {form!r}; choose from {', '.join(TEXT_FORMS)}")
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
        """Train a tokenizer in which every word of this world, and of both prompt formats, is one token.

        White space is dropped, so ` A` and `A` are the same token. Padding is on the left.
        """
        questions = [self.ask(fact, self._random("tokenizer")) for fact in self.facts]
        texts = [get_prompt_format(name).render(question) for name in PROMPTS for question in questions[:1]]
        texts += [
            _MEMBERSHIP.format(creature=""),
            *self.kind_of,
            *self.kind_of.values(),
            *(question.question for question in questions),
        ]
        texts += [value for fact in self.facts for value in FEATURES[fact.feature]]
        words = train_word_tokenizer(texts, max_vocab=100_000, keep=(*KEPT_WORDS, *LETTERS[:_MOST_CHOICES]))
        # Constructed anew: only arguments of the constructor, such as the padding side, are saved with a tokenizer.
        return PreTrainedTokenizerFast(
            tokenizer_object=words.backend_tokenizer,
            pad_token=words.pad_token,
            unk_token=words.unk_token,
            padding_side="left",
        )


def _check_range(name: str, value: float, lowest: float, highest: float) -> None:
    if not lowest <= value <= highest:
        raise ValueError(f"{name}={value} is out of range; choose a value from {lowest} to {highest}")


def _judged(question: Question) -> tuple[Piece, ...]:
    pieces = [Piece(f"{question.question} Choices")]
    for position, choice in enumerate(question.choices):
        pieces += [Piece(choice), Piece("yes" if position == question.answer else "no", scored=True)]
    return tuple(pieces)


def join_pieces(pieces: Sequence[Piece]) -> str:
    """A pre-training text as one string."""
    return " ".join(piece.text for piece in pieces)
