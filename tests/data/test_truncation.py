"""Prompts that are longer than their window."""

from dataclasses import replace

import pytest
from tokenizer_cases import byte_level

from bmoe_lightning.data.prompts import LETTERED_PROMPT_NAMES, encode_prompts, get_prompt_format
from bmoe_lightning.data.questions import Question
from bmoe_lightning.data.tokenizer import train_word_tokenizer
from bmoe_lightning.data.truncation import PromptTooLongError, fit_prompts

QUESTION = Question("q1", "What do bees make?", ("wax", "honey", "silk.", "bread"), 1)
BOOLEAN = Question("b1", "do corks float", ("False", "True"), 1, passage="Cork is light.")
LONG = Question(
    "long-1", " ".join(f"word{i}" for i in range(60)) + " so which one is it?", ("left", "right", "up", "down"), 2
)


@pytest.mark.parametrize("name", LETTERED_PROMPT_NAMES)
def test_a_long_prompt_loses_words_from_the_front_of_its_question_only(name):
    tokenizer = train_word_tokenizer([get_prompt_format(name).render(LONG)], max_vocab=200)
    prompt_format = get_prompt_format(name)
    whole = encode_prompts(tokenizer, [prompt_format.render(LONG)])[0]
    max_length = len(whole) - 25
    rows, cut = fit_prompts(tokenizer, prompt_format, [QUESTION, LONG], max_length)
    assert cut == 1
    assert rows[0] == encode_prompts(tokenizer, [prompt_format.render(QUESTION)])[0]
    # Every word of this question is one token: exactly the first 25 are gone and not one more.
    shorter = Question("s", " ".join(LONG.question.split()[25:]), LONG.choices, 2)
    assert rows[1] == encode_prompts(tokenizer, [prompt_format.render(shorter)])[0]
    assert len(rows[1]) == max_length
    assert tokenizer.convert_ids_to_tokens(rows[1])[-1] == "Answer:"


@pytest.mark.parametrize("name", LETTERED_PROMPT_NAMES)
@pytest.mark.parametrize("left", [0, 1, 7])
def test_a_passage_is_cut_and_never_its_question(name, left):
    prompt_format = get_prompt_format(name)
    passage = [f"p{i}" for i in range(20)]
    question = Question("q", "q0 q1 q2 q3", ("no", "yes"), 0, passage=" ".join(passage))
    tokenizer = train_word_tokenizer([prompt_format.render(question)], max_vocab=200)

    def encoded(passage, asked):
        shorter = Question("s", asked, ("no", "yes"), 0, passage=" ".join(passage) or None)
        return encode_prompts(tokenizer, [prompt_format.render(shorter)])[0]

    expected = encoded(passage[len(passage) - left :], question.question)
    rows, cut = fit_prompts(tokenizer, prompt_format, [question], len(expected))
    assert (rows, cut) == ([expected], 1)
    if not left:
        message = rf"question 'q': without its passage, the prompt still has {len(expected)} tokens, and max_length is"
        with pytest.raises(ValueError, match=message):
            fit_prompts(tokenizer, prompt_format, [question], len(expected) - 1)


@pytest.mark.parametrize("left", [0, 1, 7, 19])
def test_a_passage_after_its_question_is_cut_at_its_end(left):
    form = get_prompt_format("true_false")
    passage = [f"p{i}" for i in range(20)]
    question = replace(BOOLEAN, passage=" ".join(passage))
    tokenizer = train_word_tokenizer([form.render(question)], max_vocab=200)
    shorter = replace(question, passage=" ".join(passage[:left]) or None)
    expected = encode_prompts(tokenizer, [form.render(shorter)])[0]
    assert fit_prompts(tokenizer, form, [question], len(expected)) == ([expected], 1)
    assert tokenizer.convert_ids_to_tokens(expected)[-1] == "Answer:"
    if not left:
        with pytest.raises(ValueError, match="question 'b1': without its passage, the prompt still has"):
            fit_prompts(tokenizer, form, [question], len(expected) - 1)


@pytest.mark.parametrize("spare", range(6))
def test_cutting_with_sub_word_tokens_keeps_the_most_words_that_fit(spare):
    tokenizer, prompt_format = byte_level([LONG.question], bos=True), get_prompt_format("letters")
    words = LONG.question.split()

    def length(kept: int) -> int:
        question = Question("s", " ".join(words[len(words) - kept :]), LONG.choices, 2)
        return len(encode_prompts(tokenizer, [prompt_format.render(question)])[0])

    max_length = length(20) + spare
    rows, _ = fit_prompts(tokenizer, prompt_format, [LONG], max_length)
    most = max(kept for kept in range(1, len(words) + 1) if length(kept) <= max_length)
    assert len(rows[0]) == length(most) <= max_length
    assert tokenizer.decode(rows[0]).endswith("it?\nA. left\nB. right\nC. up\nD. down\nAnswer:")
    assert rows[0][0] == tokenizer.bos_token_id


def test_choices_that_do_not_fit_are_refused_with_both_lengths():
    tokenizer, prompt_format = byte_level([LONG.question]), get_prompt_format("letters")
    shortest = len(encode_prompts(tokenizer, [prompt_format.compose(LONG, None, "it?")])[0])
    assert fit_prompts(tokenizer, prompt_format, [LONG], shortest)[1] == 1
    message = rf"'long-1'.* still has {shortest} tokens, and max_length is {shortest - 1}; raise max_length or drop"
    with pytest.raises(PromptTooLongError, match=message) as error:
        fit_prompts(tokenizer, prompt_format, [LONG], shortest - 1)
    assert error.value.found.endswith(f"the prompt still has {shortest} tokens")
