"""Choices that are scored by their text: their tokens, their batches, and how the DataModule lays them out."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import pytest
from datamodule_cases import CALIBRATION, TEST, TRAIN, make, module
from tokenizer_cases import byte_level
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from bmoe_lightning.data import MultipleChoiceDataModule, Splits, load_questions
from bmoe_lightning.data.cloze import ClozeCollate, fit_cloze, indistinct
from bmoe_lightning.data.prompts import encode_prompts, get_prompt_format
from bmoe_lightning.data.questions import Question
from bmoe_lightning.data.tokenizer import train_word_tokenizer

TEST_DATA = Path(os.environ.get("BMOE_TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))
CLOZE = get_prompt_format("cloze")
QUESTION = Question("q1", " What do bees make? ", (" wax", "sweet honey ", "café"), 1, passage="Bees fly.")
LONG = Question("long", " ".join(f"word{i}" for i in range(40)) + " why?", ("left", "right over there"), 0)


def texts(*questions):
    return [f"{CLOZE.render(question)} {answer}" for question in questions for answer in CLOZE.answers(question)]


def words(*questions):
    return train_word_tokenizer(texts(*questions), max_vocab=500)


def encoded(tokenizer, *questions, max_length=256, **options):
    return fit_cloze(tokenizer, CLOZE, questions, max_length, **options)[0]


def test_the_text_is_that_of_the_harness():
    answers = ("wax", "sweet honey", "café")
    assert texts(QUESTION) == [f"Bees fly.\nWhat do bees make? {answer}" for answer in answers]


def test_the_tokens_of_a_choice_are_those_that_follow_the_prompt():
    """As in the harness: `encode(context + continuation)` without its first `len(encode(context))` tokens."""
    tokenizer = byte_level(texts(QUESTION) * 3)
    (found,) = encoded(tokenizer, QUESTION)
    prompt = encode_prompts(tokenizer, [CLOZE.render(QUESTION)])[0]
    assert list(found.token_ids) == prompt
    for choice, text in zip(found.choices, texts(QUESTION), strict=True):
        whole = encode_prompts(tokenizer, [text])[0]
        assert whole[: len(prompt)] == prompt
        assert list(choice) == whole[len(prompt) :]
        assert tokenizer.decode(choice) == text[len(CLOZE.render(QUESTION)) :]
    assert (found.num_choices, found.label, found.index) == (3, 1, 0)


def test_where_a_token_spans_prompt_and_choice_the_tokens_of_all_choices_begin_there():
    question = Question("q", "Which one is it?", ("wax", "bread"), 0)
    tokenizer = byte_level(["it? wax bread"] * 20 + ["Which one is"] * 20, splits=False)
    (found,) = encoded(tokenizer, question)
    prompt = CLOZE.render(question)
    wholes = encode_prompts(tokenizer, texts(question))
    assert [list(found.token_ids + choice) for choice in found.choices] == wholes
    assert list(found.token_ids) != encode_prompts(tokenizer, [prompt])[0]
    alone = tokenizer.convert_ids_to_tokens(list(found.token_ids))
    assert prompt.startswith("".join(alone))
    assert len("".join(alone)) < len(prompt)


def test_a_choice_without_tokens_is_refused():
    tokenizer = Tokenizer(models.WordLevel({"What": 0, "is": 1, "Answer:": 2}))
    tokenizer.normalizer = normalizers.Replace("zebra", "")
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    with pytest.raises(ValueError, match="'q': the tokenizer encodes choice A as no token"):
        encoded(fast, Question("q", "What", ("zebra", "is"), 1))


def test_a_prompt_of_which_no_token_stays_is_refused():
    question = Question("q", "it", ("wax", "bread"), 0)
    with pytest.raises(ValueError, match="no token is left that the choices could be given"):
        encoded(byte_level(["it wax"] * 20, splits=False), question)


def test_a_special_token_at_the_beginning_stays_and_one_at_the_end_does_not():
    tokenizer = byte_level(texts(QUESTION) * 3)
    plain = encoded(tokenizer, QUESTION)[0]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    found = encoded(tokenizer, QUESTION)[0]
    assert found.token_ids == (0, *plain.token_ids)
    assert found.choices == plain.choices


@pytest.mark.parametrize(
    ("normalise", "lengths"), [("sum", (1, 1, 1)), ("characters", (3, 11, 4)), ("bytes", (3, 11, 5))]
)
def test_what_scores_are_divided_by(normalise, lengths):
    assert encoded(words(QUESTION), QUESTION, normalise=normalise)[0].lengths == lengths


@pytest.mark.parametrize("spare", [0, 1, 5])
def test_a_long_question_loses_its_first_words_and_no_choice_a_token(spare):
    tokenizer = words(LONG)
    (whole,) = encoded(tokenizer, LONG)
    shortest = len(encode_prompts(tokenizer, ["why? right over there"])[0])
    items, cut = fit_cloze(tokenizer, CLOZE, [LONG, Question("short", "why?", ("left", "right"), 0)], shortest + spare)
    assert cut == 1
    assert items[0].choices == whole.choices
    assert tokenizer.decode(items[0].token_ids).split() == [*_last(spare), "why", "?"]
    assert len(items[0].token_ids) + 3 == shortest + spare


def _last(count):
    return [f"word{i}" for i in range(40 - count, 40)]


def test_a_choice_that_does_not_fit_is_refused():
    tokenizer = words(LONG)
    shortest = len(encode_prompts(tokenizer, ["why? right over there"])[0])
    message = f"'long'.* still has {shortest} tokens, and max_length is {shortest - 1}; raise max_length or drop"
    with pytest.raises(ValueError, match=message):
        encoded(tokenizer, LONG, max_length=shortest - 1)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("shared", [False, True])
def test_batches(side, shared):
    questions = (QUESTION, Question("q2", "Which?", ("wax", "sweet honey"), 0))
    items = fit_cloze(words(*questions), CLOZE, questions, 256, "characters")[0]
    batch = ClozeCollate(0, 4, side, shared=shared)(items)
    rows = 1 if shared else 4
    assert {name: tuple(value.shape[:2]) for name, value in batch.items() if value.dim() > 1} == {
        "input_ids": (2, rows), "attention_mask": (2, rows), "choice_index": (2, rows),
        "choice_length": (2, 4), "choice_mask": (2, 4),
    }  # fmt: skip
    for example, item in enumerate(items):
        for number, choice in enumerate(item.choices):
            row = 0 if shared else number
            ids, mask, index = (batch[n][example, row] for n in ("input_ids", "attention_mask", "choice_index"))
            assert ids[index == number].tolist() == list(choice)
            prompt = (mask == 1) & (index == -1)
            assert ids[prompt].tolist() == list(item.token_ids)
            real = mask.nonzero().flatten()
            assert real.tolist() == list(range(int(real[0]), int(real[-1]) + 1))
            assert (real[-1] == len(mask) - 1) if side == "left" else (real[0] == 0)
    if not shared:
        assert not batch["attention_mask"][1, 2:].any()
    assert batch["choice_length"].tolist() == [[3, 11, 4, 1], [3, 11, 1, 1]]
    assert batch["choice_mask"].tolist() == [[True, True, True, False], [True, True, False, False]]
    assert batch["label"].tolist() == [1, 0]


class TestDataModule:
    def test_has_no_answer_tokens_and_rows_for_each_choice_without_a_module(self):
        tokenizer = words(*TRAIN, *CALIBRATION, *TEST)
        data = module(tokenizer, prompt="cloze", eval_batch_size=4)
        assert data.answer_token_ids is None
        assert data.num_choices == 4
        batch = next(iter(data.test_dataloader()))
        assert batch["input_ids"].shape[:2] == (4, 4)
        assert batch["index"].tolist() == [0, 1, 2, 3]
        assert not batch["attention_mask"][1, 3].any()
        assert data.measured_shared_prompts is None

    def test_one_row_if_told_so(self):
        data = module(words(*TRAIN, *CALIBRATION, *TEST), prompt="cloze", shared_prompts=True, padding_side="right")
        batch = next(iter(data.test_dataloader()))
        assert batch["input_ids"].shape[:2] == (8, 1)
        assert batch["attention_mask"][:, :, 0].all()

    def test_equal_tokens_of_two_choices_are_warned_of(self):
        tokenizer = words(*TRAIN, *CALIBRATION, *TEST)
        odd = Question("odd", "which of train ?", ("unseen", "unknown", "c1"), 0)
        with pytest.warns(UserWarning, match="1 of 24 train questions have two choices with the same tokens"):
            data = module(tokenizer, train=(*TRAIN, odd), prompt="cloze")
        items = list(data._ready().encoded["train"])
        assert indistinct(items) == 1

    def test_no_warning_without_reason(self):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            module(words(*TRAIN, *CALIBRATION, *TEST), prompt="cloze")

    def test_long_questions_are_counted(self):
        long = make(99, words=60)
        tokenizer = words(*TRAIN, *CALIBRATION, *TEST, long)
        with pytest.warns(UserWarning, match="1 of 24 train prompts were longer than max_length=30; words were cut"):
            module(tokenizer, train=(*TRAIN, long), prompt="cloze", max_length=30)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"prompt": "cloze", "normalise": "tokens"}, "normalise is 'tokens'; it must be one of sum, characters"),
            ({"prompt": "cloze", "shared_prompts": "yes"}, "shared_prompts is 'yes'; it must be 'auto', True or False"),
            (
                {"prompt": "letters", "normalise": "bytes"},
                "prompt 'letters' are single tokens; use prompt='cloze'",
            ),
            ({"shared_prompts": True}, "answers of the prompt 'instruction' are single tokens; use prompt='cloze'"),
        ],
    )
    def test_refusals(self, options, message):
        with pytest.raises(ValueError, match=message):
            MultipleChoiceDataModule(Splits(TRAIN, CALIBRATION, TEST), "tokenizer", **options)


@pytest.mark.parametrize("folder", ["openbookqa", "arc_easy"])
def test_real_questions_have_distinct_choices_that_read_as_written(folder):
    if not (TEST_DATA / folder).is_dir():
        pytest.skip("the real data are not here")
    questions = load_questions(str(TEST_DATA / folder), "test")[:200]
    tokenizer = byte_level(texts(*questions[:50]))
    items, cut = fit_cloze(tokenizer, CLOZE, questions, 1000)
    assert (cut, indistinct(items)) == (0, 0)
    for item, question in zip(items, questions, strict=True):
        for choice, text in zip(item.choices, texts(question), strict=True):
            assert tokenizer.decode(item.token_ids + choice) == text
