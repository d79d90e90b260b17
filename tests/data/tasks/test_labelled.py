import pytest

from bmoe_lightning.data.tasks.labelled import labelled_choices, labelled_question


def row(number=0, **changes):
    return {
        "id": f"7-{number}",
        "question": f"Number {number} is",
        "choices": {"text": ["low", "high", "odd", "even"], "label": ["A", "B", "C", "D"]},
        "answerKey": "C",
    } | changes


def choices(texts, labels):
    return {"text": texts, "label": labels}


def test_label_and_text_are_not_swapped():
    question = labelled_question(row(), "question")
    assert "A" not in question.choices
    assert question.choices[question.answer] == "odd"


def test_numeric_labels_are_looked_up_and_not_computed_from_the_character():
    assert ord("2") - ord("A") != 1
    assert labelled_question(row(choices=choices([*"abcd"], [*"1234"]), answerKey="2"), "question").answer == 1


def test_the_key_is_looked_up_even_where_labels_are_out_of_order():
    question = labelled_question(row(choices=choices([*"wxyz"], [*"DBAC"]), answerKey="A"), "question")
    assert question.choices[question.answer] == "y"


def test_a_missing_key_is_told_from_an_empty_one():
    missing = {name: value for name, value in row().items() if name != "answerKey"}
    with pytest.raises(ValueError, match=r"answerKey missing; the columns found are \['choices', 'id', 'question'\]"):
        labelled_question(missing, "question")
    for empty in (None, " "):
        with pytest.raises(ValueError, match="answerKey is empty; use a split whose answers are public"):
            labelled_question(row(answerKey=empty), "question")


@pytest.mark.parametrize(("labels", "key", "answer"), [([1, 2, 3], " 3\n", 2), ([0, 1, 2], 0, 0), ([0, 1, 2], "1", 1)])
def test_integer_labels_and_keys(labels, key, answer):
    assert labelled_question(row(choices=choices([*"abc"], labels), answerKey=key), "question").answer == answer


@pytest.mark.parametrize("count", [3, 4, 5])
def test_three_to_five_choices(count):
    labels = list("ABCDE")[:count]
    found = labelled_question(
        row(choices=choices([f"t{label}" for label in labels], labels), answerKey=labels[-1]), "question"
    )
    assert (len(found.choices), found.answer) == (count, count - 1)


@pytest.mark.parametrize("column", ["question", "question_stem"])
def test_nested_form_of_the_original_archives(column):
    pairs = [{"text": "one", "label": "A"}, {"text": "two", "label": "B"}, {"text": "three", "label": "C"}]
    question = labelled_question(
        {"id": "x", "question": {"stem": "Which?", "choices": pairs}, "answerKey": "B"}, column
    )
    assert (question.question, question.choices, question.answer) == ("Which?", ("one", "two", "three"), 1)


def test_both_layouts_of_choices_read_alike():
    pairs = [{"text": "one", "label": "A"}, {"text": "two", "label": 2}]
    assert (
        labelled_choices(pairs) == labelled_choices(choices(["one", "two"], ["A ", 2])) == (("one", "two"), ("A", "2"))
    )


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"answerKey": "E"}, r"answerKey 'E' is none of the labels \['A', 'B', 'C', 'D'\]"),
        ({"answerKey": ""}, "answerKey is empty"),
        ({"answerKey": None}, "answerKey is empty"),
        ({"answerKey": ["A"]}, r"answerKey must be a text or an integer, found the list \['A'\]"),
        ({"id": None}, "id is null"),
        ({"id": ["x"]}, "id must be a text or an integer"),
        ({"id": True}, "id must be a text or an integer"),
        ({"question": ""}, "question is empty"),
        ({"question": "  "}, "question is empty"),
        ({"question": "\ud800"}, "question is not valid Unicode"),
        ({"choices": None}, "choices is null"),
        ({"choices": choices(["a", "b"], ["A"])}, "choices has 2 texts but 1 labels"),
        ({"choices": choices(["a", "b"], ["A", "A"])}, "are not all different"),
        ({"choices": choices(["a"], ["C"])}, "has 1 choices"),
        ({"choices": choices(["a", ""], ["A", "C"])}, "choice B is empty"),
        ({"choices": choices("ab", ["A", "B"])}, "text of choices must be a list, found the text 'ab'"),
        ({"choices": choices("ab", "AB")}, "text of choices must be a list"),
        ({"choices": choices({"a": 1, "b": 2}, ["A", "B"])}, "text of choices must be a list"),
        ({"choices": choices(["a", 3], ["A", "B"])}, "found the number 3 among them"),
        (
            {"choices": choices(["a", "b"], ["A", {}])},
            "label of choices must be a text or an integer, found the object {}",
        ),
        ({"choices": choices(["a", "b"], ["A", None])}, "label of choices must be a text or an integer, found null"),
        ({"choices": choices([], [])}, "text of choices is empty"),
        ({"choices": {"text": ["a", "b"]}}, "must hold 'text' and 'label'"),
        ({"choices": ["a", "b"]}, "must hold 'text' and 'label'"),
        ({"choices": 4}, "must hold 'text' and 'label'"),
    ],
)
def test_malformed_rows(changes, reason):
    with pytest.raises(ValueError, match=reason):
        labelled_question(row(**changes), "question")
