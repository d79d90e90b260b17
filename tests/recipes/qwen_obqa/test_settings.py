"""Settings from the command line and from files."""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import pytest

from recipes.qwen_obqa.settings import ALL_METHODS, Settings, SettingsError, parse_settings

ROOT = Path(__file__).parents[3]


def parse(*arguments):
    return parse_settings(arguments, program="program", description="what it does")


def test_defaults():
    assert parse() == Settings()


def test_flags():
    settings = parse("--seeds", "3", "--learning-rate", "1e-4", "--resume", "--no-dry-run", "--limit", "7")
    assert (settings.seeds, settings.learning_rate, settings.resume, settings.dry_run) == (3, 1e-4, True, False)
    assert settings.limit == 7


def test_file_wins_over_defaults_and_flags_over_the_file(tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text("learning-rate: 5e-5\nrank: 4\nmethods: [map, temperature]\nlimit: null\n")
    settings = parse("--config", str(config), "--rank", "6")
    assert (settings.learning_rate, settings.rank) == (5e-5, 6)
    assert settings.method_names == ("map", "temperature")
    assert settings.limit is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rte: 1", "did you mean 'learning_rate'"),
        ("rank: four", "rank must be of type int"),
        ("rank: true", "rank must be of type int"),
        ("quiet: 1", "quiet must be of type bool"),
        ("- rank", "name: value"),
        ("a: [", "no YAML"),
    ],
)
def test_bad_files(tmp_path, text, message):
    config = tmp_path / "run.yaml"
    config.write_text(text)
    with pytest.raises(SettingsError, match=message):
        parse("--config", str(config))


def test_missing_file():
    with pytest.raises(SettingsError, match="no config file"):
        parse("--config", "nowhere.yaml")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"methods": "map,temprature"}, "did you mean 'temperature'"),
        ({"methods": ","}, "no method"),
        ({"seeds": 0}, "seeds"),
        ({"limit": 0}, "limit"),
        ({"ensemble_size": 1}, "ensemble-size"),
        ({"train": "router"}, "train"),
        ({"fisher": "type3"}, "fisher"),
        ({"prompt": "poem"}, "prompt"),
        ({"methods": "map,temperature,map"}, "names map more than once"),
        ({"first_seed": -1}, "--first-seed"),
        ({"curvature_checkpoint_every": 0}, "--curvature-checkpoint-every must be at least 1, got 0"),
        ({"resume": True, "overwrite": True}, "one of the two"),
        ({"learning_rate": 0.0}, "--learning-rate"),
        ({"learning_rate": float("nan")}, "--learning-rate"),
        ({"weight_decay": -1.0}, "--weight-decay"),
        ({"expert_dropout": 1.0}, "--expert-dropout must be at least 0 and below 1"),
        ({"expert_dropout": -0.1}, "--expert-dropout"),
        ({"expert_dropout": 0.0}, "mc_dropout needs --expert-dropout above 0, got 0.0; or leave it out of --methods"),
        ({"num_snapshots": 1}, "checkpoint_ensemble needs --num-snapshots of at least 2"),
        ({"epochs": 1}, "checkpoint_ensemble needs --epochs of at least 2"),
        (
            {"fisher": "mc"},
            "evidence_temperature and shrunk_temperature need --fisher exact, got mc; or leave these two out",
        ),
        ({"fisher": "empirical", "methods": "map,shrunk_temperature"}, "^shrunk_temperature needs --fisher exact"),
    ],
)
def test_impossible_values(changed, message):
    with pytest.raises(SettingsError, match=message):
        Settings(**changed).resolved()


@pytest.mark.parametrize(
    "changed", [{"epochs": 1}, {"num_snapshots": 1}, {"expert_dropout": 0.0}, {"fisher": "mc"}, {"ensemble_size": 1}]
)
def test_values_that_no_method_minds(changed):
    settings = Settings(methods="map,laplace_lpo", **changed).resolved()
    assert all(getattr(settings, name) == value for name, value in changed.items())


def test_a_given_model_gets_the_paper_s_hyperparameters():
    settings = Settings(model="some/model").resolved()
    assert settings.data == "allenai/openbookqa"
    assert (settings.learning_rate, settings.precision, settings.max_length) == (5e-5, "bf16-true", 256)


def test_what_was_given_is_kept():
    assert Settings(learning_rate=1.0).resolved().learning_rate == 1.0


def test_method_names_are_the_library_s():
    from bmoe_lightning.methods.options import METHODS

    assert set(ALL_METHODS.split(",")) == set(METHODS)


def test_every_setting_has_help():
    assert all(entry.metadata.get("help") for entry in fields(Settings))


def test_help_names_every_setting_without_importing_torch():
    code = (
        "import sys\nfrom recipes.qwen_obqa.__main__ import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit as stop:\n    assert stop.code == 0\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
    )
    begin = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - begin < 30
    for entry in fields(Settings):
        assert "--" + entry.name.replace("_", "-") in done.stdout


def test_wrong_usage_exits_with_2(capsys):
    from recipes.qwen_obqa.__main__ import main

    assert main(["--methods", "magic"]) == 2
    assert "unknown method 'magic'" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main(["--no-such-flag"])
    assert stop.value.code == 2
