"""Hypothesis strategies: questions, the rows in which each data set stores them, and malformed ones."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

from hypothesis import strategies as st

from bmoe_lightning.data.questions import Question

# Combining marks, right-to-left text, NUL, line ends of every kind, invisible characters, compatibility characters.
PIECES = (
    *("a", "B", "7", " ", "\n", "\r", "\t", "\x00", "\x1f", "\x85", "\u0301", "\u05d0", "\u202e", "\u2028", "\u200b"),
    *("\ufeff", "\uff21", "\ufb03", "\U0001f600", "_", '"', "\\", "A.", "Answer:", "</s>"),
)
BLANKS = st.sampled_from(["", " ", "\n\t", "\u200b", "\x00", "\ufeff\u2028"])
SURROGATES = st.sampled_from(["\ud800", "a\udfffb"])
REMOVED = "<removed>"

_names = st.sampled_from(["text", "label", "stem", "choices", "x"])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.floats() | st.sampled_from(["", "A", "1", "x y"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_names, inner, max_size=3),
    max_leaves=6,
)
"""Any value of JSON."""


def _none_of(*kinds):
    return VALUES.filter(lambda value: type(value) not in kinds)


_parts = st.lists(st.sampled_from(PIECES) | st.characters(codec="utf-8"), max_size=6).map("".join)
_long = st.just("word " * 600)


def texts(with_long=True):
    """Texts that show at least one letter; some are very long."""
    short = st.builds(lambda before, after: f"{before}x{after}", _parts, _parts)
    return short | _long.map(lambda text: f"{text}x") if with_long else short


IDS = texts(with_long=False)


@st.composite
def questions(draw, *, count=None, passage=False, with_long=True):
    """Questions with distinct texts of choices; `count` choices, or 2 to 6."""
    number = draw(st.integers(2, 6)) if count is None else count
    text = texts(with_long)
    return Question(
        id=draw(IDS),
        question=draw(text),
        choices=tuple(draw(st.lists(text, min_size=number, max_size=number))),
        answer=draw(st.integers(0, number - 1)),
        passage=draw(text) if passage else None,
    )


@dataclass(frozen=True)
class Stored:
    """A row, the question that it holds, and for each place of the row malformed values with what names the place."""

    row: dict
    question: Question
    damages: dict = field(repr=False)


# A row must not have one of these values in a place of this kind.
_BAD_TEXT = st.just(REMOVED) | _none_of(str) | BLANKS | SURROGATES
_BAD_ID = st.just(REMOVED) | _none_of(str, int) | BLANKS | SURROGATES
_BAD_BOOL = st.just(REMOVED) | _none_of(bool)


def _bad_index(size):
    return st.just(REMOVED) | _none_of(int) | st.integers(max_value=-1) | st.integers(size, 2**40)


def _bad_texts(choices, *, counts):
    """Lists that are no list of so many texts."""
    number = len(choices)
    other = st.sampled_from([size for size in (0, 1, 27, number + 1) if size not in counts])
    return (
        st.just(REMOVED)
        | _none_of(list)
        | other.map(lambda size: [choices[0]] * size)
        | st.builds(
            lambda at, value: [*choices[:at], value, *choices[at + 1 :]],
            st.integers(0, number - 1),
            _none_of(str) | BLANKS | SURROGATES,
        )
    )


def _bad_labels(labels):
    """Labels of which two are the same, one is none, or their number is not that of the choices."""
    number = len(labels)
    changed = st.builds(
        lambda at, value: [*labels[:at], value, *labels[at + 1 :]],
        st.integers(0, number - 1),
        _none_of(str, int) | BLANKS | SURROGATES,
    )
    return (
        _none_of(list)
        | changed
        | st.sampled_from([[*labels[:-1], labels[0]], [*labels[:-1], f" {labels[0]}\n"], labels[:-1], [*labels, "Z"]])
    )


def _columns(**damages):
    """Damages of columns, each of which messages call by its name."""
    return {(name,): (name, bad) for name, bad in damages.items()}


_HALF_CHOICES = st.sampled_from([[], {}, {"text": ["a", "b"]}, {"label": ["A", "B"]}, ["a", "b"], [["a"], ["b"]]])
_LABELS = ("ABCDEF", "123456", (1, 2, 3, 4, 5, 6), ("A", "2", "C", "4", "e", "\u05d0"), (0, "1", 2, "B", 4, "C"))


@st.composite
def labelled(draw, column):
    """Rows of AI2's data sets, in each of their layouts."""
    question = draw(questions())
    number = len(question.choices)
    labels = draw(st.permutations(draw(st.sampled_from(_LABELS))))[:number]
    key = labels[question.answer]
    layout = draw(st.sampled_from(["columns", "pairs", "nested columns", "nested pairs"]))
    choices = {"text": list(question.choices), "label": list(labels)}
    if layout.endswith("pairs"):
        choices = [{"text": text, "label": label} for text, label in zip(question.choices, labels, strict=True)]
    row = {"id": question.id, "answerKey": draw(st.sampled_from([key, str(key), f" {key}\n"]))}
    at = ("question",) if layout.startswith("nested") else ()
    stem = "stem" if at else column
    content = {stem: question.question, "choices": choices}
    row |= {"question": content} if at else content
    bad_key = st.just(REMOVED) | _none_of(str, int) | BLANKS | SURROGATES | st.just("none of them")
    damages = {
        ("id",): ("id", _BAD_ID),
        ("answerKey",): ("answerKey", bad_key),
        (*at, stem): (column, _BAD_TEXT),
        (*at, "choices"): ("choice", st.just(REMOVED) | _none_of(list, dict) | _HALF_CHOICES),
    }
    if layout.endswith("columns"):
        damages[*at, "choices", "text"] = ("choice", _bad_texts(list(question.choices), counts={number}))
        damages[*at, "choices", "label"] = ("label", st.just(REMOVED) | _bad_labels(list(labels)))
    else:
        place = (*at, "choices", draw(st.integers(0, number - 1)))
        damages[*place, "text"] = ("choice", _BAD_TEXT)
        damages[*place, "label"] = ("label", _BAD_ID)
    return Stored(row, question, damages)


@st.composite
def boolq(draw):
    found = draw(questions(count=2, passage=True))
    question = Question(found.id, found.question, ("False", "True"), found.answer, found.passage)
    name = draw(st.sampled_from(["answer", "label"]))
    row = {"question": question.question, "passage": question.passage}
    row[name] = bool(question.answer) if name == "answer" else question.answer
    bad = _BAD_BOOL if name == "answer" else _bad_index(2)
    return Stored(row, question, _columns(question=_BAD_TEXT, passage=_BAD_TEXT) | {(name,): (name, bad)})


@st.composite
def mmlu(draw):
    question = draw(questions(count=4))
    choices = list(question.choices)
    row = {"question": question.question, "subject": draw(IDS), "choices": choices, "answer": question.answer}
    bad = _bad_texts(choices, counts={4})
    damages = _columns(question=_BAD_TEXT, answer=_bad_index(4)) | {("choices",): ("choice", bad)}
    return Stored(row, question, damages)


@st.composite
def medmcqa(draw):
    question = draw(questions(count=4))
    options = dict(zip(("opa", "opb", "opc", "opd"), question.choices, strict=True))
    row = {"id": question.id, "question": question.question, **options, "cop": question.answer}
    bad = dict.fromkeys(options, _BAD_TEXT)
    return Stored(row, question, _columns(id=_BAD_ID, question=_BAD_TEXT, cop=_bad_index(4), **bad))


@st.composite
def sciq(draw):
    """The order of the choices is the task's; here the right one is the first."""
    question = draw(questions(count=4))
    names = ("correct_answer", "distractor1", "distractor2", "distractor3")
    row = {"question": question.question, **dict(zip(names, question.choices, strict=True))}
    first = Question(question.id, question.question, question.choices, 0)
    return Stored(row, first, _columns(question=_BAD_TEXT, **dict.fromkeys(names, _BAD_TEXT)))


@st.composite
def winogrande(draw):
    question = draw(questions(count=2))
    text = f"{question.question}_"
    key = question.answer + 1
    row = {"sentence": text, "option1": question.choices[0], "option2": question.choices[1]}
    row["answer"] = draw(st.sampled_from([key, str(key), f" {key} "]))
    bad_sentence = _BAD_TEXT | texts().map(lambda found: found.replace("_", "-"))
    bad_key = st.just(REMOVED) | _none_of(str, int) | BLANKS | SURROGATES | st.sampled_from([0, 3, "A", "12", -1])
    damages = _columns(sentence=bad_sentence, option1=_BAD_TEXT, option2=_BAD_TEXT, answer=bad_key)
    return Stored(row, Question(question.id, text, question.choices, question.answer), damages)


ROWS = {
    "openbookqa": labelled("question_stem"),
    "arc": labelled("question"),
    "winogrande": winogrande(),
    "boolq": boolq(),
    "mmlu": mmlu(),
    "medmcqa": medmcqa(),
    "sciq": sciq(),
}
"""Rows of each task."""


@st.composite
def extended(draw, rows):
    """Rows with further columns, of any values, in any order."""
    stored = draw(rows)
    others = draw(st.dictionaries(st.sampled_from(["idx", "extra", "\u05d0", ""]), VALUES, max_size=2))
    row = dict(draw(st.permutations([*(others | stored.row).items()])))
    return Stored(row, stored.question, stored.damages)


def changed(row, path, value):
    """A copy of a row with another value in a place, or none."""
    row = copy.deepcopy(row)
    place = row
    for key in path[:-1]:
        place = place[key]
    if value is REMOVED:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return row


@st.composite
def damaged(draw, rows):
    """A malformed row, and what names the place of the fault."""
    stored = draw(rows)
    path = draw(st.sampled_from(sorted(stored.damages, key=str)))
    name, bad = stored.damages[path]
    value = draw(bad)
    return changed(stored.row, path, value), name
