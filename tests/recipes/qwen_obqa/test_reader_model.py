"""The small model for real questions."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2MoeForCausalLM

from bmoe_lightning.data import Question
from recipes.qwen_obqa import reader_model as text_model
from recipes.qwen_obqa.reader_model import read_questions


def questions(size=40):
    """Each animal always goes with the same sound, so that there is something to learn."""
    animals, sounds = ("cat", "dog", "cow", "owl"), ("meow", "woof", "moo", "hoot")
    return [
        Question(f"q{i}", f"number {i} : which sound does the {animals[i % 4]} make", sounds, i % 4)
        for i in range(size)
    ]


def read(folder, *, seed=0, steps=2, size=40, **options):
    return read_questions(questions(size), folder, steps=steps, seed=seed, batch_size=8, progress=False, **options)


def loss(folder):
    """Mean loss of the answers' words on the training texts, computed here."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    losses = []
    for question in questions():
        ids = torch.tensor([tokenizer(f"{question.question} {question.choices[question.answer]}")["input_ids"]])
        with torch.no_grad():
            losses.append(model(input_ids=ids, labels=ids).loss.item())
    return sum(losses) / len(losses)


def weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def test_loss_falls_within_thirty_steps(tmp_path):
    before = loss(read(tmp_path / "before", steps=0))
    after = loss(read(tmp_path / "after", steps=30))
    assert after < 0.5 * before


def test_loads_like_any_checkpoint(tmp_path):
    folder = read(tmp_path / "deep" / "model")
    assert folder == tmp_path / "deep" / "model"
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    assert len(tokenizer) == model.config.vocab_size
    assert not model.training
    experts = [p for name, p in model.named_parameters() if name.endswith("experts.down_proj")]
    assert [tuple(p.shape) for p in experts] == [(8, 64, 64)] * 3


@pytest.mark.parametrize(("prompt", "words"), [("instruction", "meow"), ("letters", "hoot"), ("cloze", "meow")])
def test_tokenizer_knows_the_words_of_prompt_and_choices(tmp_path, prompt, words):
    tokenizer = AutoTokenizer.from_pretrained(read(tmp_path / "model", prompt=prompt))
    form = text_model.get_prompt_format(prompt)
    text = " ".join([form.render(questions()[0]), *form.answers(questions()[0])])
    assert words in text
    assert tokenizer.unk_token_id not in tokenizer(text)["input_ids"]


def test_same_arguments_same_weights_whatever_was_drawn_before(tmp_path):
    one = weights(read(tmp_path / "one"))
    torch.manual_seed(99)
    random.seed(99)
    other = weights(read(tmp_path / "other"))
    assert all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("steps", [0, 2])
def test_another_seed_other_weights(tmp_path, steps):
    one, other = weights(read(tmp_path / "one", steps=steps)), weights(read(tmp_path / "other", steps=steps, seed=1))
    assert not torch.equal(one["lm_head.weight"], other["lm_head.weight"])


def test_random_state_is_left_alone(tmp_path):
    state = torch.get_rng_state(), random.getstate()
    read(tmp_path / "model")
    assert torch.equal(torch.get_rng_state(), state[0])
    assert random.getstate() == state[1]


def test_a_finished_folder_is_used_as_it_is(tmp_path, monkeypatch):
    folder = read(tmp_path / "model")
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}

    def never(*_, **__):
        raise AssertionError("made again")

    monkeypatch.setattr(text_model, "Qwen2MoeForCausalLM", never)
    assert read(str(folder)) == folder
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before


class Interrupted(BaseException):
    """As a keyboard interrupt would come."""


@pytest.mark.parametrize("when", ["save", "rename", "training"])
def test_an_interruption_leaves_nothing_behind(tmp_path, monkeypatch, when):
    def stop(*_, **__):
        raise Interrupted

    with monkeypatch.context() as patch:
        if when == "save":
            # The weights are written by then, the tokenizer is not.
            patch.setattr("transformers.PreTrainedTokenizerFast.save_pretrained", stop)
        elif when == "rename":
            patch.setattr("pathlib.Path.replace", stop)
        else:
            patch.setattr(Qwen2MoeForCausalLM, "forward", stop)
        with pytest.raises(Interrupted):
            read(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []
    assert loss(read(tmp_path / "model")) > 0


def test_another_process_that_was_quicker_has_made_the_model(tmp_path, monkeypatch):
    rename = Path.replace

    def late(unfinished, folder):
        shutil.copytree(unfinished, folder)  # what the other process finishes just before
        return rename(unfinished, folder)

    monkeypatch.setattr("pathlib.Path.replace", late)
    folder = read(tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert loss(folder) > 0


def test_a_rename_that_fails_for_another_reason_is_an_error(tmp_path, monkeypatch):
    def full(*_):
        raise OSError("disk full")

    monkeypatch.setattr("pathlib.Path.replace", full)
    with pytest.raises(OSError, match="disk full"):
        read(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_no_progress_of_zero_steps(tmp_path, capsys):
    read_questions(questions(), tmp_path / "model", steps=0)
    assert "small model" not in capsys.readouterr().err


def test_progress_only_when_asked(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    read(tmp_path / "quiet")
    assert "small model" not in capsys.readouterr().err
    read_questions(questions(), tmp_path / "loud", steps=1, batch_size=4)
    assert "Pre-training the small model on the questions" in capsys.readouterr().err
