from collections import Counter

import pytest
from transformers import AutoTokenizer

from bmoe_lightning.data.tokenizer import train_word_tokenizer

TEXTS = ["A frog eats a fly. Answer:", "A fly can't eat a frog! Answer:", "yes, frogs: 12 frogs"]


def tokens(tokenizer, text):
    return tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"])


def test_words_signs_and_kept_words_are_single_tokens():
    tokenizer = train_word_tokenizer(TEXTS, max_vocab=50)
    assert tokens(tokenizer, "A. frog can't eat 12 frogs!\nB. fly\nAnswer: B") == (
        ["A", ".", "frog", "can't", "eat", "12", "frogs", "!", "B", ".", "fly", "Answer:", "B"]
    )


def test_letters_are_not_cut_out_of_words_and_case_is_kept():
    tokenizer = train_word_tokenizer(TEXTS, max_vocab=50)
    assert tokens(tokenizer, "A Aardvark a Answer") == ["A", "[UNK]", "a", "[UNK]"]
    assert len({*tokenizer("A")["input_ids"], *tokenizer("a")["input_ids"]}) == 2


@pytest.mark.parametrize("word", ["Answer:", "A", "B", "C", "D", "E", "yes", "no"])
def test_the_space_before_an_answer_makes_no_difference(word):
    tokenizer = train_word_tokenizer(TEXTS, max_vocab=50)
    ids = tokenizer(word)["input_ids"]
    assert len(ids) == 1
    assert ids[0] != tokenizer.unk_token_id
    assert tokenizer(" " + word)["input_ids"] == ids


def test_no_special_token_is_added():
    tokenizer = train_word_tokenizer(TEXTS, max_vocab=50)
    assert tokenizer("fly")["input_ids"] == tokenizer("fly", add_special_tokens=False)["input_ids"]
    assert (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.eos_token_id) == (0, 1, None)


def test_the_most_frequent_words_are_kept_and_ties_go_by_the_alphabet():
    texts = ["red red red blue blue green amber", "cyan"]
    tokenizer = train_word_tokenizer(texts, max_vocab=2 + 1 + 4, keep=["A"])
    assert len(tokenizer) == 7
    known = {word for word in Counter(" ".join(texts).split()) if tokens(tokenizer, word) == [word]}
    assert known == {"red", "blue", "amber", "cyan"}


def test_the_same_texts_give_the_same_vocabulary_in_any_order():
    first = train_word_tokenizer(TEXTS, max_vocab=25).get_vocab()
    assert first == train_word_tokenizer(reversed(TEXTS), max_vocab=25).get_vocab()
    assert sorted(first.values()) == list(range(len(first)))


def test_saved_and_loaded_without_a_network(tmp_path):
    tokenizer = train_word_tokenizer(TEXTS, max_vocab=50)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "A. frog\nB. can't fly, unheard\nAnswer: B"
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert (loaded.pad_token_id, loaded.unk_token_id, loaded.get_vocab()) == (0, 1, tokenizer.get_vocab())


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        ([], {"max_vocab": 50}, "hold no word"),
        (["  \n"], {"max_vocab": 50}, "hold no word"),
        (TEXTS, {"max_vocab": 13}, "13 reserved entries"),
        (TEXTS, {"max_vocab": 50, "keep": ["not one"]}, "the word 'not one' of keep is not one word"),
    ],
)
def test_impossible_requests_are_refused(texts, options, message):
    with pytest.raises(ValueError, match=message):
        train_word_tokenizer(texts, **options)
