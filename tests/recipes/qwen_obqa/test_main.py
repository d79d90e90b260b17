"""Exit codes of the command, and where its messages go."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from recipes.qwen_obqa import __main__ as qwen_obqa
from recipes.qwen_obqa import experiment
from recipes.qwen_obqa.__main__ import main
from recipes.qwen_obqa.settings import ResolvedSettings

ROOT = Path(__file__).parents[3]


@pytest.fixture
def ran(monkeypatch):
    """The settings that the run was started with, in place of the run."""
    seen = []
    monkeypatch.setattr(experiment, "run", seen.append)
    return seen


def test_success_is_0_and_settings_arrive_resolved(ran, capsys):
    assert main(["--seeds", "2", "--model", "some/model"]) == 0
    (settings,) = ran
    assert isinstance(settings, ResolvedSettings)
    assert (settings.seeds, settings.data, settings.learning_rate) == (2, "allenai/openbookqa", 5e-5)
    assert "".join(capsys.readouterr()) == ""


def test_without_arguments_the_command_line_is_read(ran, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["qwen_obqa.py", "--curvature.rank", "3"])
    assert main() == 0
    assert ran[0].curvature.rank == 3
    assert main([]) == 0
    assert ran[1].curvature.rank == 32


def test_a_run_that_cannot_go_on_is_1_with_a_sentence(monkeypatch, capsys):
    def cannot(settings):
        raise experiment.RecipeError("the hub is away; give a local folder")

    monkeypatch.setattr(experiment, "run", cannot)
    assert main([]) == 1
    shown = capsys.readouterr()
    assert shown.err == "error: the hub is away; give a local folder\n"
    assert shown.out == ""


@pytest.mark.parametrize("error", [KeyError("a defect"), SystemExit(5)])
def test_what_is_no_expected_failure_keeps_its_traceback(monkeypatch, error):
    def broken(settings):
        raise error

    monkeypatch.setattr(experiment, "run", broken)
    with pytest.raises(type(error)):
        main([])


def interrupted_in_lightning():
    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt:
        sys.exit(1)


STOPS = {
    "SIGTERM": (lambda: os.kill(os.getpid(), signal.SIGTERM), 143),
    "SIGINT": (lambda: os.kill(os.getpid(), signal.SIGINT), 130),
    "SIGINT in a trainer": (interrupted_in_lightning, 130),
}


@pytest.mark.parametrize("case", STOPS)
def test_a_signal_gives_its_exit_status_and_one_sentence(monkeypatch, capsys, case):
    stop, status = STOPS[case]
    monkeypatch.setattr(experiment, "run", lambda settings: stop())
    assert main(["--output-dir", "here"]) == status
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"stopped by {case.split()[0]}: ")
    assert "here; run the same command again" in line
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_handler_of_sigterm_that_is_set_stays(monkeypatch):
    received = []
    before = signal.signal(signal.SIGTERM, lambda *_: received.append(0))
    try:
        monkeypatch.setattr(experiment, "run", lambda settings: os.kill(os.getpid(), signal.SIGTERM))
        assert main([]) == 0
    finally:
        signal.signal(signal.SIGTERM, before)
    assert received == [0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "0"], "--epochs must be at least 1, got 0"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        (["--curvature.sketch", "svd"], "--curvature.sketch must be one of auto, nystrom, rsvd, exact, got svd"),
        (["--method", "map"], "unknown option --method, did you mean --methods?"),
        (["--resume", "--overwrite"], "give one of the two"),
    ],
)
def test_wrong_usage_is_2_and_nothing_runs(ran, capsys, arguments, message):
    assert main(arguments) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("error: ")
    assert message in shown.err
    assert len(shown.err.splitlines()) == 1
    assert shown.out == ""
    assert ran == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "map,temprature"], "--methods: unknown method 'temprature', did you mean 'temperature'?"),
        (["--methods", "map", "--set", "mapp.x=1"], "--set mapp.x: 'mapp' is not among --methods, did you mean map?"),
        (["--set", "map.x"], "--set must be METHOD.OPTION=VALUE, got 'map.x'"),
    ],
)
def test_names_are_refused_without_torch(arguments, message):
    script = (
        "import sys\n"
        "from recipes.qwen_obqa.__main__ import main\n"
        "assert main(sys.argv[1:]) == 2\n"
        "assert not {'torch', 'transformers', 'lightning'} & set(sys.modules)\n"
    )
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith(f"error: {message}")


def test_help_shows_the_three_ways_to_run_it(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert qwen_obqa.DESCRIPTION.strip() in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "map,temprature"], "error: --methods: unknown method 'temprature', did you mean 'temperature'?"),
        (["--methods", "map", "--set", "map.nme=x"], "error: --set map has no option 'nme', did you mean name?"),
    ],
)
def test_methods_are_refused_before_anything_is_written(tmp_path, capsys, arguments, message):
    assert main([*arguments, "--output-dir", str(tmp_path / "run")]) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith(message)
    assert len(shown.err.splitlines()) == 1
    assert shown.out == ""
    assert not (tmp_path / "run").exists()


def test_the_process_exits_with_main_s_code():
    command = [sys.executable, "-m", "recipes.qwen_obqa", "--epochs", "0"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert (done.returncode, done.stderr) == (2, "error: --epochs must be at least 1, got 0\n")
