from dataclasses import replace

import pytest
import tokenizer_cases
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from bmoe_lightning.data.prompts import (
    LETTERED_PROMPT_NAMES,
    PromptFormat,
    answer_token_ids,
    encode_prompts,
    get_prompt_format,
    leading_special_ids,
)
from bmoe_lightning.data.questions import LETTERS, Question
from bmoe_lightning.data.tokenizer import train_word_tokenizer

QUESTION = Question("q1", " What do bees make? ", ("wax", "honey", "silk.", "bread"), 1)
PROMPTS = [get_prompt_format(name).render(QUESTION) for name in LETTERED_PROMPT_NAMES]
CORPUS = [*PROMPTS * 3, " A A A B B B C C C D D D E E E", "Answer: A Answer: B Answer: C Answer: D Answer: E" * 5]


def byte_level(corpus=CORPUS, **options):
    return tokenizer_cases.byte_level(corpus, **options)


def word_level(vocabulary: list[str], pre_tokenizer=None) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(
        models.WordLevel({"[UNK]": 0} | {w: i for i, w in enumerate(vocabulary, 1)}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = pre_tokenizer or pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")


def test_letters_prompt():
    assert get_prompt_format("letters").render(QUESTION) == (
        "What do bees make?\nA. wax\nB. honey\nC. silk.\nD. bread\nAnswer:"
    )


def test_instruction_prompt():
    assert get_prompt_format("instruction").render(QUESTION) == (
        "Select one of the choices that answers the following question: What do bees make? "
        "Choices: A. wax B. honey C. silk. D. bread Answer:"
    )


@pytest.mark.parametrize("name", LETTERED_PROMPT_NAMES)
@pytest.mark.parametrize("count", [2, 3, 5])
def test_every_choice_stands_after_its_own_letter(name, count):
    question = Question("q", "Which?", tuple(f"text{i}" for i in range(count)), 0)
    prompt = get_prompt_format(name).render(question)
    for letter, text in zip(LETTERS, question.choices, strict=False):
        assert prompt.count(f"{letter}. {text}") == 1
    assert f"{LETTERS[count]}. " not in prompt
    assert prompt.endswith("Answer:")


def test_unknown_prompt_lists_the_names():
    with pytest.raises(ValueError, match="unknown prompt 'letter'; choose from letters, instruction"):
        get_prompt_format("letter")


@pytest.mark.parametrize("tail", ["Answer: ", "Answer:\n", ""])
def test_a_format_that_ends_in_white_space_is_refused(tail):
    with pytest.raises(ValueError, match="without white space"):
        PromptFormat(name="mine", head="", before_choices=" ", separator=" ", tail=tail)


def test_byte_level_answer_is_the_letter_with_its_space():
    tokenizer = byte_level()
    ids = answer_token_ids(tokenizer, PROMPTS, 5)
    assert ids.dtype == torch.int64
    assert ids.shape == (5,)
    assert tokenizer.convert_ids_to_tokens(ids.tolist()) == ["ĠA", "ĠB", "ĠC", "ĠD", "ĠE"]
    bare = tokenizer.convert_tokens_to_ids(list("ABCDE"))
    assert not set(bare) & set(ids.tolist())


@pytest.mark.parametrize(("bos", "eos"), [(True, False), (False, True), (True, True)])
def test_answer_tokens_do_not_depend_on_special_tokens(bos, eos):
    plain = answer_token_ids(byte_level(), PROMPTS, 4)
    assert torch.equal(answer_token_ids(byte_level(bos=bos, eos=eos), PROMPTS, 4), plain)


def test_metaspace_answer_is_the_letter_with_its_mark():
    words = ["▁Question", "▁Answer:", "▁A", "▁B", "▁C"]
    tokenizer = word_level(words, pre_tokenizers.Metaspace())
    ids = answer_token_ids(tokenizer, ["Question Answer:"], 3)
    assert tokenizer.convert_ids_to_tokens(ids.tolist()) == ["\u2581A", "\u2581B", "\u2581C"]


def test_word_level_answer_is_the_bare_letter():
    tokenizer = train_word_tokenizer(PROMPTS, max_vocab=100)
    ids = answer_token_ids(tokenizer, PROMPTS, 4)
    assert tokenizer.convert_ids_to_tokens(ids.tolist()) == ["A", "B", "C", "D"]


def test_two_token_answer_is_refused_and_shown():
    tokenizer = byte_level(corpus=["nothing with capital letters"])
    with pytest.raises(ValueError, match=r"' A' after .* is not one token: .*'Ġ', 'A'.*use a tokenizer"):
        answer_token_ids(tokenizer, PROMPTS, 4)


def test_an_answer_that_merges_with_the_prompt_is_refused():
    tokenizer = word_level(["x Answer:", "A"], pre_tokenizers.Split("|", behavior="isolated"))
    with pytest.raises(ValueError, match="is not one token"):
        answer_token_ids(tokenizer, ["x Answer:"], 2)


def test_an_answer_that_changes_the_prompts_last_token_is_refused():
    class Merging:
        def __call__(self, text, **_):
            return {"input_ids": [1, 2] if text.endswith(":") else [1, 7, 8]}

        def convert_ids_to_tokens(self, ids):
            return [f"t{i}" for i in ids]

    with pytest.raises(ValueError, match=r"is not one token: the text then ends in \['t1', 't7', 't8'\]"):
        answer_token_ids(Merging(), ["Answer:"], 2)


def test_letters_that_share_a_token_are_refused_and_shown():
    tokenizer = word_level(["Answer:", "A", "B"])
    with pytest.raises(ValueError, match=r"share a token: .*'C': '\[UNK\]', 'D': '\[UNK\]'"):
        answer_token_ids(tokenizer, ["Answer:"], 4)


def test_one_unknown_letter_is_refused():
    tokenizer = word_level(["Answer:", "A", "B", "C"])
    with pytest.raises(ValueError, match=r"unknown to the tokenizer: .*'D': '\[UNK\]'"):
        answer_token_ids(tokenizer, ["Answer:"], 4)


def test_answer_tokens_that_change_with_the_prompt_are_refused():
    class Fickle:
        unk_token_id = None

        def __call__(self, text, **_):
            base = [7] if text.startswith("one") else [8]
            letter = {"A": 1, "B": 2}.get(text[-1])
            return {"input_ids": base + ([] if letter is None else [letter + 10 * base[0]])}

        def convert_ids_to_tokens(self, ids):
            return [str(i) for i in ids]

    with pytest.raises(ValueError, match=r"depend on the prompt: \['71', '72'\] and \['81', '82'\]"):
        answer_token_ids(Fickle(), ["one:", "two:"], 2)


@pytest.mark.parametrize(
    ("prompts", "count", "message"),
    [
        ([], 4, "no prompts"),
        (["Answer:"], 1, "num_choices is 1"),
        (["Answer:"], 27, "num_choices is 27"),
        (["Answer: "], 4, "without white space"),
    ],
)
def test_answer_token_arguments_are_checked(prompts, count, message):
    with pytest.raises(ValueError, match=message):
        answer_token_ids(byte_level(), prompts, count)


@pytest.mark.parametrize(("bos", "eos"), [(False, False), (True, False), (False, True), (True, True)])
def test_encoded_prompts_end_in_the_prompt_and_never_in_an_end_of_sequence_token(bos, eos):
    tokenizer = byte_level(bos=bos, eos=eos)
    assert leading_special_ids(tokenizer) == ([0] if bos else [])
    for ids, prompt in zip(encode_prompts(tokenizer, PROMPTS), PROMPTS, strict=True):
        assert 1 not in ids
        assert (ids[0] == 0) == bos
        assert tokenizer.decode(ids[bos:]) == prompt
    assert encode_prompts(tokenizer, []) == []


def test_a_tokenizer_that_always_ends_in_a_special_token_is_refused():
    class Stubborn:
        unk_token_id = None
        all_special_ids = (9,)

        def __call__(self, text, **_):
            return {"input_ids": [3, 9] if isinstance(text, str) else [[3, 9] for _ in text]}

        def convert_ids_to_tokens(self, ids):
            return ["</s>" if i == 9 else "x" for i in ids]

    with pytest.raises(ValueError, match=r"'</s>'\] at its end; .*add_eos_token=False"):
        encode_prompts(Stubborn(), ["Answer:"])


def test_a_tokenizer_that_rewrites_the_text_between_special_tokens_is_refused():
    class Rewriting:
        def __call__(self, text, add_special_tokens=True, **_):
            return {"input_ids": [1, 5] if add_special_tokens else [3, 4]}

    with pytest.raises(ValueError, match=r"as \[3, 4\] without and as \[1, 5\] with special tokens"):
        leading_special_ids(Rewriting())


@pytest.mark.parametrize("prompt", ["", "Answer: ", "Answer:\n"])
def test_prompts_with_trailing_white_space_are_refused(prompt):
    with pytest.raises(ValueError, match="without white space"):
        encode_prompts(byte_level(), [prompt])


def test_settings_saved_in_the_tokenizer_neither_truncate_nor_pad():
    tokenizer = byte_level()
    expected = encode_prompts(tokenizer, PROMPTS)
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.enable_padding(length=500)
    assert encode_prompts(tokenizer, PROMPTS) == expected


def test_a_passage_stands_before_the_question():
    question = Question("q", "do corks float", ("no", "yes"), 1, passage=" Cork is light. ")
    assert get_prompt_format("letters").render(question) == ("Cork is light.\ndo corks float\nA. no\nB. yes\nAnswer:")
    assert get_prompt_format("instruction").render(question) == (
        "Select one of the choices that answers the following question: Cork is light. do corks float "
        "Choices: A. no B. yes Answer:"
    )


BOOLEAN = Question("b1", "do corks float", ("False", "True"), 1, passage=" Cork is light. It floats. ")


def test_true_false_prompt_lists_no_choices_and_ends_as_every_other():
    form = get_prompt_format("true_false")
    expected = "Answer the question with only True or False: do corks float Context: Cork is light. It floats. Answer:"
    assert form.render(BOOLEAN) == expected
    without = replace(BOOLEAN, passage=None)
    assert form.render(without) == "Answer the question with only True or False: do corks float Answer:"


@pytest.mark.parametrize("choices", [("False", "True"), ("True", "False"), (" true", "FALSE ")])
def test_the_answer_tokens_are_the_words_of_the_choices_in_their_order(choices):
    form = get_prompt_format("true_false")
    question = replace(BOOLEAN, choices=choices)
    words = form.answers_of_all([question, question])
    assert [word.casefold() for word in words] == [choice.strip().casefold() for choice in choices]
    tokenizer = byte_level(corpus=[" True False" * 5, *CORPUS])
    ids = answer_token_ids(tokenizer, [form.render(question)], 2, words=words)
    right = tokenizer.convert_ids_to_tokens(ids.tolist())[question.answer]
    assert right == "\u0120" + choices[question.answer].strip().capitalize()


def test_other_choices_than_true_and_false_are_refused():
    form = get_prompt_format("true_false")
    assert [form.applies(question) for question in (BOOLEAN, QUESTION)] == [True, False]
    assert all(get_prompt_format(name).applies(QUESTION) for name in LETTERED_PROMPT_NAMES)
    message = r"'q1' has the choices .* the prompt 'true_false' is answered by False or True; use a prompt .* letters"
    with pytest.raises(ValueError, match=message):
        form.answers_of_all([BOOLEAN, QUESTION])
    other = replace(BOOLEAN, id="b2", choices=("True", "False"))
    with pytest.raises(ValueError, match="of question 'b2' are in another order than those of 'b1'"):
        form.answers_of_all([BOOLEAN, other])


def test_letters_are_as_many_as_the_widest_question_has_choices():
    wide = replace(QUESTION, choices=("v", "w", "x", "y", "z"))
    assert get_prompt_format("letters").answers_of_all([QUESTION, wide, BOOLEAN]) == tuple("ABCDE")
