"""What the tests of the data module share: questions, and a module of them."""

import json
from pathlib import Path

from bmoe_lightning.data.datamodule import MultipleChoiceDataModule
from bmoe_lightning.data.prompts import get_prompt_format
from bmoe_lightning.data.questions import Question, Splits


def make(number: int, part: str = "train", choices: int = 4, words: int = 1) -> Question:
    text = " ".join(["really"] * (words - 1) + [f"number{number}", "of", part, "?"])
    return Question(f"{part}-{number}", text, tuple(f"c{i}" for i in range(choices)), number % choices)


TRAIN = tuple(make(i, words=1 + i % 5) for i in range(23))
CALIBRATION = tuple(make(i, "calibration") for i in range(7))
TEST = tuple(make(i, "test", choices=3 if i % 2 else 4) for i in range(11))


def render(questions, prompt="instruction"):
    return [get_prompt_format(prompt).render(question) for question in questions]


def module(tokenizer, train=TRAIN, calibration=CALIBRATION, test=TEST, **options):
    data = MultipleChoiceDataModule(Splits(tuple(train), tuple(calibration), tuple(test)), tokenizer, **options)
    data.setup()
    return data


def write(folder: Path, **splits) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    for name, questions in splits.items():
        rows = [
            {
                "id": q.id,
                "question": q.question,
                "choices": {"text": list(q.choices), "label": list("ABCDE")[: len(q.choices)]},
                "answerKey": "ABCDE"[q.answer],
            }
            for q in questions
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return str(folder)
