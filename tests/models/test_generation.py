"""Answers that a model writes, against a loop over prompts and tokens."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from oracles.models import tiny_qwen

from bmoe_lightning.models import generate_answers, text_scores, with_answers

PROMPTS = ([3, 4, 5], [7, 8], [2, 9, 11, 6], [1])
LENGTH = 5


def prompts(side):
    width = max(map(len, PROMPTS))
    rows = [[0] * (width - len(p)) + p if side == "left" else p + [0] * (width - len(p)) for p in PROMPTS]
    masks = [[int(token > 0) for token in row] for row in rows]
    return {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(masks)}


def model_with(end=None, pad=None):
    model = tiny_qwen()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = end, pad
    return model


def greedy(model, prompt, end):
    ids = list(prompt)
    for _ in range(LENGTH):
        ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == end:
            break
    return ids[len(prompt) :]


@pytest.fixture(scope="module")
def end():
    """A token that ends the answer to one prompt early, and not to all."""
    model = model_with()
    answers = [greedy(model, prompt, None) for prompt in PROMPTS]
    return next(token for token in answers[0][1:-1] if any(token not in answer for answer in answers))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pad", [None, 0])
def test_greedy_answers_are_those_of_each_prompt_alone(side, pad, end):
    model = model_with(end, pad)
    found = generate_answers(model, prompts(side), max_new_tokens=LENGTH)
    expected = [greedy(model, prompt, end) for prompt in PROMPTS]
    assert found.tokens() == expected
    assert len({len(answer) for answer in expected}) > 1
    assert found.prompt_lengths.tolist() == [3, 2, 4, 1]
    assert found.text is None
    for row, prompt, answer in zip(range(4), PROMPTS, expected, strict=True):
        assert found.input_ids[row][found.attention_mask[row].bool()].tolist() == prompt + answer


def test_answers_are_scored_as_they_are(end):
    """Log-probabilities of the written tokens, the end token among them and nothing behind it."""
    model = model_with(end)
    found = generate_answers(model, prompts("right"), max_new_tokens=LENGTH)
    scores = text_scores(model, found.batch)
    for number, (prompt, answer) in enumerate(zip(PROMPTS, found.tokens(), strict=True)):
        logits = model(input_ids=torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
        value = sum(logits[len(prompt) + i - 1, token] for i, token in enumerate(answer))
        torch.testing.assert_close(scores.log_prob[number].double(), value, rtol=1e-5, atol=1e-5)
        assert int(scores.num_tokens[number]) == len(answer)


def test_a_model_without_end_token_writes_to_the_end():
    found = generate_answers(model_with(), prompts("left"), max_new_tokens=3)
    assert [len(answer) for answer in found.tokens()] == [3] * 4


def test_samples_depend_on_the_seed_alone_and_nothing_of_the_user_changes():
    model = model_with().train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    torch.manual_seed(11)
    state = torch.get_rng_state()
    first, again, other = (
        generate_answers(model, prompts("left"), max_new_tokens=LENGTH, temperature=1.0, seed=seed)
        for seed in (5, 5, 6)
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(first.input_ids, again.input_ids)
    assert not torch.equal(first.input_ids, other.input_ids)
    assert not torch.equal(first.input_ids, generate_answers(model, prompts("left"), max_new_tokens=LENGTH).input_ids)
    broken = model_with().train()
    broken.generation_config.suppress_tokens = [3]
    with pytest.raises(RuntimeError):
        generate_answers(broken, prompts("left") | {"input_ids": 99 * torch.ones(4, 4)}, max_new_tokens=1)
    assert broken.training
    assert broken.generation_config.suppress_tokens == [3]


def test_samples_are_of_the_models_own_distribution():
    """Whatever its generation config says: the first token's frequencies are its probabilities."""
    model = model_with()
    for name, value in {"top_k": 1, "top_p": 0.1, "repetition_penalty": 5.0, "temperature": 0.1}.items():
        setattr(model.generation_config, name, value)
    one = {"input_ids": torch.tensor([[3, 4, 5]]), "attention_mask": torch.ones(1, 3, dtype=torch.int64)}
    many = {name: value.expand(4000, -1) for name, value in one.items()}
    drawn = generate_answers(model, many, max_new_tokens=1, temperature=1.0).input_ids[:, -1]
    share = torch.bincount(drawn, minlength=30) / len(drawn)
    probability = model(**one).logits[0, -1].softmax(-1).detach()
    assert float((share - probability).abs().max()) < 0.03
    assert int((share > 0).sum()) > 5


@pytest.fixture(scope="module")
def written(end):
    """A model with end and padding token, and its answers by temperature."""
    model = model_with(end, 0)
    return model, {temperature: written_by(model, temperature) for temperature in (None, 1.0)}


def written_by(model, temperature):
    return generate_answers(model, prompts("left"), max_new_tokens=LENGTH, temperature=temperature).tokens()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("suppress_tokens", list(range(2, 30))),
        ("begin_suppress_tokens", list(range(2, 30))),
        ("bad_words_ids", [[token] for token in range(2, 30)]),
        ("sequence_bias", {(0,): 50.0}),
        ("min_new_tokens", LENGTH),
        ("min_length", 20),
        ("max_time", 0.0),
        ("stop_strings", ["a"]),
        ("repetition_penalty", 5.0),
        ("encoder_repetition_penalty", 5.0),
        ("exponential_decay_length_penalty", (0, 50.0)),
        ("encoder_no_repeat_ngram_size", 1),
        ("guidance_scale", 9.0),
        ("forced_eos_token_id", 0),
        ("watermarking_config", {"bias": 50.0}),
        ("num_beams", 3),
        ("top_h", 0.01),
        ("return_dict_in_generate", True),
        ("prompt_lookup_num_tokens", 2),
        ("custom_of_the_user", 1),
    ],
)
def test_options_of_the_models_generation_config_are_not_used_and_stay(monkeypatch, written, name, value):
    model, expected = written
    config = model.generation_config
    monkeypatch.setattr(config, name, value, raising=False)
    before = dict(vars(config))
    temperature = 1.0 if name == "top_h" else None
    assert written_by(model, temperature) == expected[temperature]
    assert model.generation_config is config
    assert vars(config) == before


def test_text_is_that_of_the_answer():
    tokenizer = SimpleNamespace(decode=lambda ids, skip_special_tokens: " ".join(map(str, ids.tolist())))
    found = generate_answers(model_with(), prompts("right"), max_new_tokens=2, tokenizer=tokenizer)
    assert found.text == tuple(" ".join(map(str, answer)) for answer in found.tokens())


@pytest.mark.parametrize(
    ("changes", "options", "said"),
    [
        ({"attention_mask": torch.ones(4, 3)}, {}, r"one shape \[B, T\], got \(4, 4\) and \(4, 3\)"),
        ({"attention_mask": torch.tensor([[1] * 4, [0] * 4, [1] * 4, [1] * 4])}, {}, "prompt 1 of the batch has no"),
        ({"input_ids": torch.ones(0, 4), "attention_mask": torch.ones(0, 4)}, {}, "there is no prompt"),
        ({}, {"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({}, {"temperature": 0.0}, "temperature must be above 0, or None"),
    ],
)
def test_what_cannot_be_continued_is_refused(changes, options, said):
    with pytest.raises(ValueError, match=said):
        generate_answers(model_with(), prompts("left") | changes, **{"max_new_tokens": 2, **options})


def test_a_model_that_writes_no_text_is_refused():
    with pytest.raises(TypeError, match="Qwen2MoeModel continues no prompt; pass a causal language model"):
        generate_answers(tiny_qwen().model, prompts("left"), max_new_tokens=2)


@pytest.mark.parametrize("side", ["left", "right"])
def test_answers_of_others_stand_where_written_ones_do(side, end):
    written = generate_answers(model_with(end, 0), prompts(side), max_new_tokens=LENGTH)
    given = with_answers(prompts(side), written.tokens())
    assert given.tokens() == written.tokens()
    for name in ("attention_mask", "answer_mask", "prompt_lengths"):
        assert torch.equal(getattr(given, name), getattr(written, name))
    with pytest.raises(ValueError, match="an answer of at least one token to each of 4 prompts, got"):
        with_answers(prompts(side), [[1], [2], []])
    with pytest.raises(ValueError, match="an answer of at least one token"):
        with_answers(prompts(side), [[1], [2], [], [3]])
