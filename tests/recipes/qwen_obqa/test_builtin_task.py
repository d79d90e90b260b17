import random
from collections import Counter

import pytest
import torch
from transformers import AutoTokenizer

from bmoe_lightning.data.prompts import answer_token_ids, encode_prompts, get_prompt_format
from recipes.qwen_obqa.builtin_task import FEATURES, PROMPTS, World, join_pieces

SMALL = World(seed=3, kinds=4, creatures_per_kind=10, features=3, fit_items=40, calibration_items=20)


def test_equal_arguments_give_equal_worlds_and_a_seed_means_the_same_for_ever():
    again = World(seed=3, kinds=4, creatures_per_kind=10, features=3, fit_items=40, calibration_items=20)
    assert again.facts == SMALL.facts
    assert again.questions("test") == SMALL.questions("test")
    question = SMALL.questions("test")[0]
    assert [*list(SMALL.kind_of)[:3], question.id, question.choices] == [
        "pigave",
        "valo",
        "nofer",
        "winter-enemy-rugovi",
        ("weasel", "otter", "shark", "wolf"),
    ]


def test_another_seed_gives_another_world_and_no_random_state_is_touched():
    random.seed(1)
    torch.manual_seed(1)
    before = random.getstate(), torch.get_rng_state()
    other = World(seed=4, kinds=4, creatures_per_kind=10, features=3, fit_items=40, calibration_items=20)
    assert set(other.kind_of) != set(SMALL.kind_of)
    assert other.questions("fit") != SMALL.questions("fit")
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])


def test_facts_cover_every_creature_and_feature_in_both_seasons_once():
    seen = Counter((fact.creature, fact.season, fact.feature) for fact in SMALL.facts)
    assert len(seen) == 40 * 2 * 3
    assert set(seen.values()) == {1}
    assert Counter(SMALL.kind_of.values()) == Counter(dict.fromkeys(SMALL.kind_of.values(), 10))
    assert all(fact.kind == SMALL.kind_of[fact.creature] for fact in SMALL.facts)


def test_a_kind_has_one_usual_value_and_exceptions_come_at_the_given_rate():
    world = World()
    usual = {(fact.kind, fact.season, fact.feature, fact.usual) for fact in world.facts}
    assert len(usual) == 12 * 2 * 4
    exceptions = sum(fact.value != fact.usual for fact in world.facts)
    expected = 0.1 * len(world.facts)
    assert abs(exceptions - expected) < 4 * (expected * 0.9) ** 0.5
    assert all(fact.value == fact.usual for fact in World(exception_rate=0.0).facts)
    assert all(fact.value != fact.usual for fact in World(exception_rate=1.0).facts)


def test_questions_are_answered_by_the_facts_and_tempt_with_the_usual_value():
    facts = {f"{fact.season}-{fact.feature}-{fact.creature}": fact for fact in SMALL.facts}
    for split in ("fit", "calibration", "test", "pretraining"):
        for question in SMALL.questions(split):
            fact = facts[question.id]
            assert question.choices[question.answer] == fact.value
            assert fact.usual in question.choices
            assert len(set(question.choices)) == 4
            assert set(question.choices) <= set(FEATURES[fact.feature])
            assert fact.creature in question.question
            assert fact.season == ("summer" if split == "pretraining" else "winter")


def test_splits_are_disjoint_and_complete_and_letters_are_balanced():
    splits = {split: [question.id for question in SMALL.questions(split)] for split in ("fit", "calibration", "test")}
    assert [len(ids) for ids in splits.values()] == [40, 20, 60]
    assert len(set().union(*splits.values())) == 120
    assert len(SMALL.questions("pretraining")) == 120
    letters = Counter(question.answer for question in World().questions("pretraining"))
    assert all(150 < letters[letter] < 240 for letter in range(4))


def test_the_default_world_has_the_sizes_of_the_recipe():
    world = World()
    assert [len(world.questions(split)) for split in ("fit", "calibration", "test")] == [259, 172, 337]
    assert 250 < len(world.tokenizer()) < 300


def test_statements_name_true_facts_of_both_seasons_and_score_their_last_words():
    rng = random.Random(0)
    facts = {f"{fact.stem} {fact.value}" for fact in SMALL.facts}
    facts |= {f"The {creature} is a {kind}" for creature, kind in SMALL.kind_of.items()}
    seasons = Counter()
    for _ in range(200):
        pieces = SMALL.pretraining_text("statements", rng)
        assert [piece.scored for piece in pieces] == [False, True, False] * 3
        for start in range(0, 9, 3):
            sentence = join_pieces(pieces[start : start + 2])
            assert sentence in facts
            seasons.update(word for word in sentence.split() if word in ("summer", "winter"))
        assert pieces[-1].text == "."
    assert min(seasons["summer"], seasons["winter"]) > 150


@pytest.mark.parametrize("form", ["answered", "judged"])
def test_questions_are_read_about_summer_only(form):
    rng = random.Random(0)
    texts = [join_pieces(SMALL.pretraining_text(form, rng)) for _ in range(200)]
    assert all(" summer " in text and "winter" not in text for text in texts)


def test_answered_questions_end_in_the_right_letter_after_the_letters_prompt():
    values = {fact.stem: fact.value for fact in SMALL.facts}
    rng = random.Random(0)
    for _ in range(100):
        prompt, letter = SMALL.pretraining_text("answered", rng)
        assert (prompt.scored, letter.scored) == (False, True)
        stem, *choices, tail = prompt.text.split("\n")
        assert tail == "Answer:"
        assert f"{letter.text}. {values[stem]}" in choices


def test_judged_questions_say_yes_to_the_true_value_alone():
    values = {fact.stem: fact.value for fact in SMALL.facts}
    rng = random.Random(0)
    for _ in range(100):
        head, *pieces = SMALL.pretraining_text("judged", rng)
        stem = head.text.removesuffix(" Choices")
        choices, verdicts = pieces[::2], pieces[1::2]
        assert not head.scored
        assert not any(piece.scored for piece in choices)
        assert all(piece.scored for piece in verdicts)
        assert [piece.text for piece in verdicts] == ["yes" if c.text == values[stem] else "no" for c in choices]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_tokenizer_knows_every_word_of_every_prompt(prompt):
    tokenizer = SMALL.tokenizer()
    form = get_prompt_format(prompt)
    questions = [question for split in ("fit", "test", "pretraining") for question in SMALL.questions(split)]
    prompts = [form.render(question) for question in questions]
    encoded = encode_prompts(tokenizer, prompts)
    assert not any(tokenizer.unk_token_id in ids for ids in encoded)
    assert len({len(ids) for ids in encoded}) == 1
    letters = answer_token_ids(tokenizer, prompts[:3], 4).tolist()
    assert tokenizer.convert_ids_to_tokens(letters) == ["A", "B", "C", "D"]
    assert tokenizer(" A")["input_ids"] == tokenizer("A")["input_ids"] == letters[:1]


def test_the_tokenizer_knows_every_pretraining_text_and_survives_saving(tmp_path):
    tokenizer = SMALL.tokenizer()
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    rng = random.Random(0)
    for form in ("statements", "judged", "answered"):
        pieces = SMALL.pretraining_text(form, rng)
        whole = loaded(join_pieces(pieces))["input_ids"]
        assert whole == [token for piece in pieces for token in tokenizer(piece.text)["input_ids"]]
        assert tokenizer.unk_token_id not in whole
    assert loaded.padding_side == "left"
    assert tokenizer.get_vocab() == SMALL.tokenizer().get_vocab()


def test_eight_choices_are_lettered():
    world = World(choices=8)
    form = get_prompt_format("letters")
    prompt = form.render(world.questions("fit")[0])
    assert len(set(answer_token_ids(world.tokenizer(), [prompt], 8).tolist())) == 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kinds": 1}, "kinds=1"),
        ({"kinds": 17}, "from 2 to 16"),
        ({"creatures_per_kind": 0}, "creatures_per_kind=0"),
        ({"features": 7}, "features=7"),
        ({"exception_rate": 1.5}, "exception_rate=1.5"),
        ({"choices": 9}, "choices=9"),
        ({"fit_items": 700}, "768 questions"),
        ({"calibration_items": 0}, "must be positive"),
    ],
)
def test_impossible_worlds_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        World(**arguments)


def test_unknown_splits_and_forms_are_refused():
    with pytest.raises(ValueError, match="no split 'validation'; choose from fit, calibration"):
        SMALL.questions("validation")
    with pytest.raises(ValueError, match="form 'poem'; choose from statements"):
        SMALL.pretraining_text("poem", random.Random(0))
