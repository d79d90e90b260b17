"""The generated data sets of the small preset: questions of several forms about one world, with graded shift.

All data sets ask about facts of the same `World`, which one pre-trained model knows, in place of the six of the paper.
A fact belongs to one split, whatever the data set, so that no test fact is trained on under any form.

    recall       four choices, any fact                             (in the place of OpenBookQA)
    regular      four choices, facts that are usual for the kind    (ARC-Easy)
    exceptions   four choices, two usual facts for each exception   (ARC-Challenge)
    pairs_small  two choices, few training questions                (Winogrande-S)
    pairs        two choices                                        (Winogrande-M)
    judged       is a statement true or false?                      (BoolQ)

A model that was trained on `recall` meets, in this order, nearly the same questions (`regular`), others of which fewer
can be guessed from the kind (`exceptions`), fewer choices (`pairs`), and another form (`judged`).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bmoe_lightning.data.questions import Question, Splits
from recipes.qwen_obqa.builtin_task import FEATURES, Fact, Split, World

WORLD = World(exception_rate=0.2)
"""The world of all data sets; more exceptions than in the main job, so that there are enough to ask about."""

_SPLITS: tuple[Split, ...] = ("fit", "calibration", "test")
_FEW = 64
_TRUE, _FALSE = "yes", "no"


@dataclass(frozen=True)
class GeneratedSet:
    """A generated data set.

    Attributes:
        name: Name, lower-case letters and underscores.
        label: Display name.
        stands_for: Data set of the paper in whose place it is.
        ask: Function that turns the facts of one split into questions.
        most_training: Largest number of training questions; None for all.
    """

    name: str
    label: str
    stands_for: str
    ask: Callable[[World, Sequence[Fact], random.Random], list[Question]]
    most_training: int | None = None

    def splits(self, world: World = WORLD) -> Splits:
        """The questions of all splits, the same in every process.

        Args:
            world: World that is asked about.
        """
        parts = []
        for split in _SPLITS:
            # A string seed is hashed the same way in every process.
            rng = random.Random(f"{self.name} {world.seed}: {split}")
            questions = self.ask(world, _facts(world, split), rng)
            rng.shuffle(questions)
            parts.append(tuple(questions))
        train, calibration, test = parts
        return Splits(train[: self.most_training], calibration, test)


def _facts(world: World, split: Split) -> list[Fact]:
    """The facts that a split asks about, in the order of its questions."""
    by_id = {fact.identifier: fact for fact in world.facts}
    return [by_id[question.id] for question in world.questions(split)]


def _recall(world: World, facts: Sequence[Fact], rng: random.Random) -> list[Question]:
    return [world.ask(fact, rng) for fact in facts]


def _regular(world: World, facts: Sequence[Fact], rng: random.Random) -> list[Question]:
    return [world.ask(fact, rng) for fact in facts if not fact.is_exception]


def _exceptions(world: World, facts: Sequence[Fact], rng: random.Random) -> list[Question]:
    exceptions = [fact for fact in facts if fact.is_exception]
    usual = [fact for fact in facts if not fact.is_exception]
    return [world.ask(fact, rng) for fact in (*exceptions, *rng.sample(usual, 2 * len(exceptions)))]


def _pairs(world: World, facts: Sequence[Fact], rng: random.Random) -> list[Question]:  # noqa: ARG001
    questions = []
    for fact in facts:
        choices = [fact.value, fact.usual if fact.is_exception else _other_value(fact, rng)]
        rng.shuffle(choices)
        questions.append(Question(fact.identifier, fact.stem, tuple(choices), choices.index(fact.value)))
    return questions


def _judged(world: World, facts: Sequence[Fact], rng: random.Random) -> list[Question]:  # noqa: ARG001
    questions = []
    for fact in facts:
        is_true = rng.random() < 0.5
        # A false statement about an exception is what its kind would suggest.
        claimed = fact.value if is_true else fact.usual if fact.is_exception else _other_value(fact, rng)
        answer = 0 if is_true else 1
        questions.append(Question(fact.identifier, f"{fact.stem} {claimed}", (_TRUE, _FALSE), answer))
    return questions


def _other_value(fact: Fact, rng: random.Random) -> str:
    return rng.choice([value for value in FEATURES[fact.feature] if value not in (fact.value, fact.usual)])


GENERATED_SETS: tuple[GeneratedSet, ...] = (
    GeneratedSet("recall", "Recall", "OpenBookQA", _recall),
    GeneratedSet("exceptions", "Exceptions", "ARC-Challenge", _exceptions),
    GeneratedSet("regular", "Regular", "ARC-Easy", _regular),
    GeneratedSet("pairs_small", "Few pairs", "Winogrande-S", _pairs, most_training=_FEW),
    GeneratedSet("pairs", "Pairs", "Winogrande-M", _pairs),
    GeneratedSet("judged", "Judged", "BoolQ", _judged),
)
"""All generated data sets, in the order of the paper's columns."""


def generated_set(name: str) -> GeneratedSet:
    """Look up a generated data set.

    Args:
        name: Its name.

    Raises:
        ValueError: If there is none of that name.
    """
    by_name = {entry.name: entry for entry in GENERATED_SETS}
    if name not in by_name:
        raise ValueError(f"there is no generated data set {name!r}; choose from {', '.join(by_name)}")
    return by_name[name]
