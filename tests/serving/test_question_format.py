"""How questions become batches: the same as those of the DataModule that the model was fine-tuned with."""

from __future__ import annotations

import json

import pytest
import torch
from finetuner_cases import TEST, finetuner, qwen
from serving_cases import data_of

from bmoe_lightning.data import Question
from bmoe_lightning.serving import QuestionFormat

LETTERS = {"prompt": "letters", "num_choices": 4, "answer_token_ids": (3, 4, 5, 6)}
CLOZE = {"prompt": "cloze", "num_choices": 4, "answer_token_ids": None}


@pytest.mark.parametrize("prompt", ["letters", "instruction", "cloze"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_batches_and_logits_are_those_of_the_data(prompt, side):
    data = data_of(prompt, padding_side=side)
    data.setup()
    form, module = QuestionFormat.of_data(data), finetuner(qwen())
    assert QuestionFormat.from_description(json.loads(json.dumps(form.description()))) == form
    module._answer_ids = data.answer_token_ids
    start = 0
    for expected in data.test_dataloader():
        questions = TEST[start : start + len(expected["label"])]
        start += len(questions)
        found = form.batch(form.encoded(data.tokenizer, questions)[0])
        assert set(found) == set(expected) - {"label", "index"}
        for name, value in found.items():
            assert torch.equal(value, expected[name]), name
        with torch.no_grad():
            logits = module.class_logits(expected)[0]
            assert torch.equal(form.class_logits(module.model, found), logits)
    assert start == len(TEST)


def test_long_questions_lose_words_as_in_training():
    data = data_of(max_length=24)
    data.setup()
    form = QuestionFormat.of_data(data)
    long = Question("long", " ".join(["is"] * 60), ("c0", "c1"), 0)
    (item,), cut = form.encoded(data.tokenizer, [long])
    assert len(item.token_ids) <= 24
    assert cut == 1
    assert form.encoded(data.tokenizer, [TEST[0], long, long])[1] == 2
    too_long = Question("choices", "is it", (" ".join(["c0"] * 30), "c1"), 0)
    with pytest.raises(ValueError, match=r"tokens, and the model was fine-tuned with prompts of at most 24; shorten"):
        form.encoded(data.tokenizer, [too_long])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": "other"}, "unknown prompt"),
        ({"prompt": 3}, "prompt must be a name"),
        ({"prompt": ["letters"]}, "prompt must be a name"),
        ({"num_choices": 1}, "num_choices"),
        ({"num_choices": True}, "num_choices"),
        ({"num_choices": 5}, "has 4 answer tokens"),
        ({"answer_token_ids": None}, "has None answer tokens"),
        ({"answer_token_ids": (3, 3, 5, 6)}, "different token ids"),
        ({"answer_token_ids": (3, 4, 5, "6")}, "must be integers"),
        ({"answer_token_ids": (3, 4, 5, 6.5)}, "must be integers"),
        ({"max_length": 0}, "max_length"),
        ({"pad_id": -1}, "pad_id"),
        ({"padding_side": "top"}, "padding_side"),
        ({"normalise": "words"}, "normalise must be one of sum, characters, bytes"),
        ({"shared_prompts": 1}, "shared_prompts must be True or False"),
    ],
)
def test_other_values_are_refused(change, message):
    with pytest.raises((TypeError, ValueError), match=message):
        QuestionFormat(**{**LETTERS, **change})


def test_words_answer_in_the_order_of_training():
    """Other orders and other choices have the same prompt, and would get each other's probabilities."""
    words = {"prompt": "true_false", "num_choices": 2, "answer_token_ids": (3, 4), "answer_words": ("True", "False")}
    form = QuestionFormat(**words)
    assert QuestionFormat.from_description(form.description()) == form
    tokenizer = data_of().tokenizer
    assert len(form.encoded(tokenizer, [Question("a", "is it", ("true", "False"), 0)])[0]) == 1
    for choices in (("False", "True"), ("ice", "water")):
        with pytest.raises(ValueError, match=r"question 'a'"):
            form.encoded(tokenizer, [Question("a", "is it", choices, 0)])
    for wrong in (None, ("True",), ("yes", "no")):
        with pytest.raises(ValueError, match="has the answer words"):
            QuestionFormat(**{**words, "answer_words": wrong})
    with pytest.raises(ValueError, match="has the answer words"):
        QuestionFormat(**LETTERS, answer_words=("True", "False"))


def test_answer_tokens_are_for_letters_only():
    assert QuestionFormat(**CLOZE).answer_token_ids is None
    with pytest.raises(ValueError, match="none for cloze"):
        QuestionFormat(**{**CLOZE, "answer_token_ids": (3, 4, 5, 6)})
