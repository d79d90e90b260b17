import json

import pytest

from bmoe_lightning.data.hub import load_questions
from bmoe_lightning.data.questions import Question
from bmoe_lightning.data.tasks.winogrande import Winogrande

ROW = {"sentence": "The cup fell off the table since the _ shook.", "option1": "cup", "option2": "table"}


@pytest.mark.parametrize(("answer", "position"), [("1", 0), ("2", 1), (" 2", 1), (2, 1)])
def test_the_answer_counts_options_from_one(answer, position):
    found = Winogrande().question({**ROW, "answer": answer}, "test-4")
    assert found == Question("test-4", ROW["sentence"], ("cup", "table"), position)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("", "answer is empty; use a split whose answers are public"),
        ("3", r"answer '3' is none of the labels \['1', '2'\]"),
        ("0", "answer '0' is none"),
        ("A", "answer 'A' is none"),
        (True, "answer must be a text or an integer, found the boolean True"),
    ],
)
def test_a_row_without_an_answer_is_refused(answer, message):
    with pytest.raises(ValueError, match=f"^here: {message}"):
        Winogrande().read({**ROW, "answer": answer}, "test-4", "here")


def test_a_sentence_without_a_blank_is_refused():
    with pytest.raises(ValueError, match=r"here: sentence has no blank \(_\): 'No blank'"):
        Winogrande().read({**ROW, "sentence": "No blank", "answer": "1"}, "test-4", "here")


def test_the_unlabelled_test_split_is_never_read(tmp_path):
    folder = tmp_path / "winogrande_xs"
    folder.mkdir()
    for split, answer in (("train", "1"), ("validation", "2"), ("test", "")):
        (folder / f"{split}.jsonl").write_text(json.dumps({**ROW, "answer": answer}))
    source = f"{tmp_path}:winogrande_xs"
    assert [load_questions(source, split)[0].answer for split in ("train", "test")] == [0, 1]
    assert load_questions(source, "validation") is None


def test_one_of_the_nested_configurations_has_to_be_named():
    with pytest.raises(ValueError, match=r"write allenai/winogrande:winogrande_xs or .* or .*:winogrande_xl"):
        load_questions("allenai/winogrande", "train")
