"""Questions that are asked in two splits, which are found and left out of the earlier one.

A test question that was trained on, or that a temperature was tuned on, makes the reported numbers too good. The test
part never changes.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable
from dataclasses import replace

from bmoe_lightning.data.questions import Question, Splits, choices_key, question_key

_logger = logging.getLogger(__name__)


def make_disjoint(splits: Splits, *, reported: str = "test") -> Splits:
    """Leave out of each part the questions that a later one asks too (train < calibration < test).

    Two questions are the same if their texts are (`question_key`), whatever their choices: data sets repeat questions
    with the choices in another order. How many have the same choices too is reported beside.

    Args:
        splits: Any splits; train and calibration may be empty.
        reported: Name of the split that the test part is, for the warning; some protocols report `validation`.

    Returns:
        The disjoint splits, but for calibration questions that are trained on by intent
        (`Splits.calibration_in_train`).

    Warns:
        UserWarning: If there are such questions: one sentence with their numbers, which is logged too.
    """
    calibration, again = leave_out(splits.calibration, splits.test, "calibration", f"{reported} split")
    if splits.calibration_in_train or not calibration:
        train, trained = leave_out(splits.train, splits.test, "train", f"{reported} split")
    else:
        held_out = (*calibration, *splits.test)
        train, trained = leave_out(splits.train, held_out, "train", f"calibration or {reported} split")
    found = [sentence for sentence in (trained, again) if sentence]
    if found:
        message = f"{', and '.join(found)}; they were left out"
        _logger.info(message)
        warnings.warn(message, UserWarning, stacklevel=2)
    return replace(splits, train=train, calibration=calibration)


def leave_out(
    questions: tuple[Question, ...], held_out: Iterable[Question], name: str, held_out_name: str
) -> tuple[tuple[Question, ...], str]:
    """The questions that are not held out, and a clause about the others.

    Args:
        questions: Questions of one part.
        held_out: Questions that must not be among them; the same text is the same question (`question_key`).
        name: Name of the part.
        held_out_name: What the held-out questions are, in words.

    Returns:
        `(remaining questions, clause)`; the clause is empty if all remain.
    """
    choices: dict[str, set[frozenset[str]]] = {}
    for question in held_out:
        choices.setdefault(question_key(question), set()).add(choices_key(question))
    repeated = [question for question in questions if question_key(question) in choices]
    if not repeated:
        return questions, ""
    same = sum(choices_key(question) in choices[question_key(question)] for question in repeated)
    remaining = tuple(question for question in questions if question_key(question) not in choices)
    return remaining, (
        f"{len(repeated)} of {len(questions)} {name} questions are also asked in the {held_out_name} "
        f"({same} with the same choices)"
    )
