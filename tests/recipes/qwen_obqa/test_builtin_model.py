import json
import logging
import random
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from bmoe_lightning.data.prompts import answer_token_ids, encode_prompts, get_prompt_format
from recipes.qwen_obqa import builtin_model as small_model
from recipes.qwen_obqa.builtin_model import Lesson, PretrainingSettings, pretrain, small_moe_config
from recipes.qwen_obqa.builtin_task import World

WORLD = World(seed=1, kinds=2, creatures_per_kind=4, features=2, exception_rate=0.0, fit_items=6, calibration_items=4)
# A handful of steps: enough for everything but learning.
SHORT = PretrainingSettings(
    steps=3,
    max_steps=3,
    batch_size=4,
    lessons=(Lesson(1, statements=1.0), Lesson(3, 1.0, 1.0, 1.0)),
    least_accuracy=0.0,
)


def test_configuration_makes_a_mixture_of_experts():
    config = small_moe_config(100, layers=2)
    model = AutoModelForCausalLM.from_config(config)
    experts = [parameter for name, parameter in model.named_parameters() if ".experts.down_proj" in name]
    assert [tuple(parameter.shape) for parameter in experts] == [(8, 64, 64)] * 2
    with pytest.raises(ValueError, match="hidden_size=60"):
        small_moe_config(100, hidden_size=60)
    with pytest.raises(ValueError, match="experts=1"):
        small_moe_config(100, experts=1)


def test_learning_rate_rises_stays_falls_and_stops_falling():
    settings = PretrainingSettings(steps=100, warmup_steps=10, decay_share=0.4, least_learning_rate=0.25)
    assert settings.learning_rate_factor(0) == pytest.approx(0.1)
    assert settings.learning_rate_factor(30) == 1.0
    assert settings.learning_rate_factor(80) == pytest.approx(0.5)
    assert settings.learning_rate_factor(99) == settings.learning_rate_factor(200) == 0.25


def test_lessons_follow_one_another():
    settings = replace(SHORT, lessons=(Lesson(5, statements=1.0), Lesson(9, judged=3.0, answered=1.0)))
    rng = random.Random(0)
    assert {settings.draw_form(4, rng) for _ in range(50)} == {"statements"}
    for step in (5, 8, 100):
        forms = [settings.draw_form(step, rng) for _ in range(1000)]
        assert abs(forms.count("judged") - 750) < 60
        assert forms.count("statements") == 0


def test_the_folder_loads_like_any_checkpoint_and_is_made_once(tmp_path, monkeypatch):
    folder = pretrain(WORLD, cache_dir=tmp_path, settings=SHORT, progress=False)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert len(tokenizer) == model.config.vocab_size
    assert {path.name for path in tmp_path.iterdir()} == {folder.name}
    assert (folder / "model.safetensors").is_file()
    record = json.loads((folder / "pretraining.json").read_text())
    assert record["steps"] == 3

    monkeypatch.setattr(small_model, "_Pretraining", None)
    assert pretrain(WORLD, cache_dir=tmp_path, settings=SHORT, progress=False) == folder


def test_the_same_arguments_give_the_same_weights_and_leave_random_state_alone(tmp_path):
    state = torch.get_rng_state(), random.getstate()
    one = AutoModelForCausalLM.from_pretrained(
        pretrain(WORLD, cache_dir=tmp_path / "1", settings=SHORT, progress=False)
    )
    assert torch.equal(torch.get_rng_state(), state[0])
    assert random.getstate() == state[1]
    torch.manual_seed(99)
    two = AutoModelForCausalLM.from_pretrained(
        pretrain(WORLD, cache_dir=tmp_path / "2", settings=SHORT, progress=False)
    )
    for name, value in one.state_dict().items():
        assert torch.equal(value, two.state_dict()[name]), name


@pytest.mark.parametrize(
    "other",
    [
        {"world": replace(WORLD, seed=2)},
        {"settings": replace(SHORT, learning_rate=1e-3)},
        {"seed": 1},
        {"config": small_moe_config(len(WORLD.tokenizer()), layers=2)},
    ],
    ids=lambda other: next(iter(other)),
)
def test_whatever_changes_the_model_changes_the_folder(tmp_path, monkeypatch, other):
    monkeypatch.setattr(
        small_model._Pretraining, "run", lambda self, progress: (self.model, {"steps": 0, "accuracy": 0.0})
    )
    arguments = {"world": WORLD, "settings": SHORT, "cache_dir": tmp_path, "progress": False}
    first = pretrain(**arguments)
    assert pretrain(**{**arguments, **other}) != first


def test_an_interrupted_save_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(*_arguments, **_keywords):
        raise OSError("No space left on device")

    monkeypatch.setattr(small_model.Qwen2MoeForCausalLM, "save_pretrained", full)
    with pytest.raises(OSError, match="No space left"):
        pretrain(WORLD, cache_dir=tmp_path, settings=SHORT, progress=False)
    assert list(tmp_path.iterdir()) == []


def test_a_quicker_process_is_no_error(tmp_path, monkeypatch):
    run = small_model._Pretraining.run

    def overtaken(self, *, progress):
        with monkeypatch.context() as inner:
            inner.setattr(small_model._Pretraining, "run", run)
            pretrain(WORLD, cache_dir=tmp_path, settings=SHORT, progress=False)
        return run(self, progress=progress)

    monkeypatch.setattr(small_model._Pretraining, "run", overtaken)
    folder = pretrain(WORLD, cache_dir=tmp_path, settings=SHORT, progress=False)
    assert list(tmp_path.iterdir()) == [folder]


def test_a_model_that_learned_nothing_is_refused_and_a_weak_one_told(tmp_path, caplog):
    with pytest.raises(RuntimeError, match=r"after 3 steps the small model answers .* raise max_steps"):
        pretrain(WORLD, cache_dir=tmp_path, settings=replace(SHORT, least_accuracy=1.0), progress=False)
    assert list(tmp_path.iterdir()) == []
    with caplog.at_level(logging.WARNING):
        pretrain(WORLD, cache_dir=tmp_path, settings=SHORT, progress=False)
    assert "results will be weaker" in caplog.text


def test_one_thread_is_used_and_the_setting_restored_also_after_an_error(tmp_path, monkeypatch):
    seen = []

    def failing(self, *, progress):
        seen.append(torch.get_num_threads())
        raise RuntimeError("stop")

    monkeypatch.setattr(small_model._Pretraining, "run", failing)
    torch.set_num_threads(2)
    try:
        with pytest.raises(RuntimeError, match="stop"):
            pretrain(WORLD, cache_dir=tmp_path, settings=SHORT, progress=False)
        assert (seen, torch.get_num_threads()) == ([1], 2)
    finally:
        torch.set_num_threads(1)


def test_a_configuration_for_another_vocabulary_is_refused(tmp_path):
    with pytest.raises(ValueError, match="vocabulary of 7 words"):
        pretrain(WORLD, small_moe_config(7), cache_dir=tmp_path, settings=SHORT, progress=False)


def test_progress_is_shown_only_when_asked(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    pretrain(WORLD, cache_dir=tmp_path / "1", settings=SHORT, progress=False)
    assert "Pre-training" not in capsys.readouterr().err
    pretrain(WORLD, cache_dir=tmp_path / "2", settings=SHORT, progress=True)
    assert "Pre-training the small model" in capsys.readouterr().err


def test_targets_are_the_scored_words_and_early_ones_those_of_statements():
    tokenizer = WORLD.tokenizer()
    rng = random.Random(0)
    texts = [WORLD.pretraining_text(form, rng) for form in ("statements", "judged", "answered")]
    ids, targets, early = small_model._PieceEncoder(tokenizer).batch(texts)
    for row, text in enumerate(texts):
        whole = [token for piece in text for token in tokenizer(piece.text)["input_ids"]]
        assert ids[row, : len(whole)].tolist() == whole
        assert tokenizer.convert_ids_to_tokens(targets[row][targets[row] != -100].tolist()) == (
            [piece.text for piece in text if piece.scored]
        )
    assert torch.equal(early[0], targets[0])
    assert (early[1:] == -100).all()


@pytest.mark.slow
def test_a_tiny_world_is_learned_and_answered_through_the_loading_code(tmp_path):
    settings = PretrainingSettings(max_steps=900)
    folder = pretrain(WORLD, cache_dir=tmp_path, settings=settings, progress=False)
    record = json.loads((folder / "pretraining.json").read_text())
    assert record["accuracy"] >= settings.target_accuracy
    assert record["steps"] < settings.max_steps

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    questions = WORLD.questions("pretraining")
    prompts = [get_prompt_format("letters").render(question) for question in questions]
    letters = answer_token_ids(tokenizer, prompts[:1], 4)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor(encode_prompts(tokenizer, prompts))).logits[:, -1, letters]
    answers = torch.tensor([question.answer for question in questions])
    assert (logits.argmax(-1) == answers).float().mean() >= 0.9
