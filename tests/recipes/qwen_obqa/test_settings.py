"""Settings of a run, from the command line, from files, and by the kind of run."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import get_args, get_type_hints

import pytest

from recipes.common.cli import UsageError, parse
from recipes.qwen_obqa import settings as settings_module
from recipes.qwen_obqa.settings import CurvatureSettings, ResolvedCurvature, ResolvedSettings, Settings


def read(*arguments):
    return parse(Settings, arguments, program="program", description="what it does")


def test_defaults():
    assert read() == Settings()


def test_flags():
    settings = read("--seeds", "3", "--learning-rate", "1e-4", "--resume", "--no-dry-run", "--limit", "7",
                    "--curvature.rank", "6", "--set", "a.b=1", "--set", "c.d=x,y")  # fmt: skip
    assert (settings.seeds, settings.learning_rate, settings.resume, settings.dry_run) == (3, 1e-4, True, False)
    assert (settings.limit, settings.curvature.rank, settings.set) == (7, 6, ("a.b=1", "c.d=x,y"))


def test_a_file_wins_over_defaults_and_flags_over_the_file(tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(
        "learning-rate: 5e-5\nlimit: null\nset: [b.link=probit]\n"
        "curvature: {rank: 4, fisher: mc}\n"
        "methods: [map, {class_path: their_module.Mine, init_args: {width: 3}}]\n"
    )
    settings = read("--config", str(config), "--curvature.rank", "6", "--set", "b.num_samples=20")
    assert (settings.learning_rate, settings.limit) == (5e-5, None)
    assert settings.curvature == CurvatureSettings(rank=6, fisher="mc")
    assert settings.methods == ("map", {"class_path": "their_module.Mine", "init_args": {"width": 3}})
    assert settings.set == ("b.link=probit", "b.num_samples=20")
    assert read("--config", str(config), "--methods", "map,b").methods == ("map", "b")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"seeds": 0}, "--seeds must be at least 1, got 0"),
        ({"limit": 0}, "--limit must be at least 1, got 0"),
        ({"epochs": 0}, "--epochs must be at least 1, got 0"),
        ({"first_seed": -1}, "--first-seed must be at least 0, got -1"),
        ({"curvature": CurvatureSettings(rank=-1)}, "--curvature.rank must be at least 0, got -1"),
        ({"curvature_checkpoint_every": 0}, "--curvature-checkpoint-every must be at least 1, got 0"),
        ({"resume": True, "overwrite": True}, "--resume and --overwrite exclude each other; give one of the two"),
        ({"task": "openbookqa"}, "--task, --revision and --protocol apply to --data alone"),
        ({"protocol": "paper"}, "--task, --revision and --protocol apply to --data alone"),
        ({"prompt": "true_false"}, "--prompt true_false is for questions that True or False answers"),
        ({"revision": "main"}, "--task, --revision and --protocol apply to --data alone"),
        ({"learning_rate": 0.0}, "--learning-rate must be a number above 0"),
        ({"learning_rate": math.nan}, "--learning-rate must be a number above 0"),
        (
            {"normalise": "characters"},
            "--normalise characters is for choices that are scored by their text, and the answers of the prompt format "
            "letters are single tokens; add --prompt cloze",
        ),
        ({"weight_decay": -1.0}, "--weight-decay must be a number of at least 0"),
        ({"weight_decay": math.inf}, "--weight-decay must be a number of at least 0"),
        ({"expert_dropout": 1.0}, "--expert-dropout must be at least 0 and below 1"),
        ({"expert_dropout": -0.1}, "--expert-dropout must be at least 0 and below 1"),
    ],
)
def test_impossible_values(changed, message):
    with pytest.raises(UsageError) as found:
        Settings(**changed).resolved()
    assert str(found.value).startswith(message)


def test_a_given_model_gets_the_paper_s_hyperparameters():
    settings = Settings(model="some/model").resolved()
    assert settings.data == "allenai/openbookqa"
    assert (settings.learning_rate, settings.precision, settings.max_length) == (5e-5, "bf16-true", 256)
    assert settings.curvature == ResolvedCurvature(rank=10)


def test_the_small_model_has_other_ones():
    settings = Settings().resolved()
    assert (settings.kind, settings.data, settings.epochs, settings.prompt) == ("builtin", None, 44, "letters")
    assert settings.curvature.rank == 32
    settings = Settings(data="a folder", dry_run=True).resolved()
    assert (settings.kind, settings.epochs, settings.prompt) == ("small", 2, "instruction")


def test_a_dry_run_of_a_given_model_has_small_batches_unless_sizes_are_given():
    settings = Settings(model="m", dry_run=True).resolved()
    assert (settings.epochs, settings.batch_size, settings.eval_batch_size) == (2, 2, 2)
    settings = Settings(model="m", dry_run=True, batch_size=8).resolved()
    assert (settings.epochs, settings.batch_size, settings.eval_batch_size) == (2, 8, 2)


def test_choices_may_be_scored_by_their_text():
    settings = Settings(prompt="cloze", normalise="bytes").resolved()
    assert (settings.kind, settings.prompt, settings.normalise) == ("builtin", "cloze", "bytes")


def test_what_was_given_stays():
    curvature = CurvatureSettings(rank=0, fisher="mc", sketch="nystrom")
    settings = Settings(learning_rate=1.0, dry_run=True, epochs=5, curvature=curvature, data="d", model="m").resolved()
    assert (settings.learning_rate, settings.epochs, settings.data) == (1.0, 5, "d")
    assert settings.curvature == ResolvedCurvature(rank=0, fisher="mc", sketch="nystrom")


def test_nothing_is_left_open():
    hints = get_type_hints(ResolvedSettings)
    opened = {name for name, hint in hints.items() if type(None) in get_args(hint)}
    limits = {"limit", "limit_train", "limit_validation", "limit_test"}
    assert opened == {"model", "data", "task", "revision", "protocol", "save_model", *limits}
    assert {entry.name for entry in fields(ResolvedSettings)} == {entry.name for entry in fields(Settings)}


def test_choices_are_the_library_s():
    from lightning.fabric.connector import _PRECISION_INPUT_STR

    from bmoe_lightning.curvature.fisher import FisherName
    from bmoe_lightning.curvature.sketch import SketchName
    from bmoe_lightning.data.cloze import Normalisation
    from bmoe_lightning.data.prompts import PROMPT_NAMES

    assert set(get_args(settings_module.Prompt)) == set(PROMPT_NAMES)
    assert set(get_args(settings_module.FisherName)) == set(get_args(FisherName))
    assert set(get_args(settings_module.SketchName)) == set(get_args(SketchName))
    assert set(get_args(settings_module.Normalise)) == set(get_args(Normalisation))
    assert set(get_args(settings_module.Precision)) <= set(get_args(_PRECISION_INPUT_STR))
