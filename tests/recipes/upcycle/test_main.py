"""The command: exit codes, where its messages go, and what its options may be."""

from __future__ import annotations

import pytest
import upcycle_cases as cases

from recipes.upcycle import upcycling
from recipes.upcycle.__main__ import main


def test_success_is_0(tmp_path, capsys):
    source = cases.save(tmp_path / "dense", cases.dense_model())
    assert main(["--model", source, "--output", str(tmp_path / "moe"), "--experts", "3", "--layers", "1"]) == 0
    assert "Expert layers found: 1 of 3 layers" in capsys.readouterr().out
    assert (tmp_path / "moe" / "config.json").is_file()


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--experts 1", "--experts must be at least 2, got 1"),
        ("--top-k 9", "--top-k must be at most --experts, which is 8, got 9"),
        ("--layers half", "--layers must be all, upper-half or a number of layers above 0, got half"),
        ("--layers 0", "--layers must be all, upper-half or a number of layers above 0, got 0"),
        ("--segments 3", "--segments must be a power of two, got 3: others round the weights"),
        ("--noise -1", "--noise must be a number of at least 0, got -1.0"),
        ("--router-std 0", "--router-std must be a number above 0, got 0.0"),
        ("--reinitialise 1.5", "--reinitialise must be from 0 to 1, got 1.5"),
        ("--noise 1 --reinitialise 1", "--noise and --reinitialise exclude each other; give one of the two"),
        ("--dtype float64", "--dtype must be one of auto, float32, bfloat16, float16, got float64"),
    ],
)
def test_impossible_values_are_2(capsys, flags, sentence):
    assert main(["--model", "m", "--output", "o", *flags.split()]) == 2
    assert capsys.readouterr().err == f"error: {sentence}\n"


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        ("nobody/nothing", "the model 'nobody/nothing' could not be loaded"),
        ("./no/such/folder", "there is no folder './no/such/folder'"),
    ],
)
def test_a_model_that_is_not_there_is_1(tmp_path, capsys, model, sentence):
    assert main(["--model", model, "--output", str(tmp_path / "moe")]) == 1
    shown = capsys.readouterr().err
    assert shown.startswith(f"error: {sentence}")
    assert shown.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("stop", "name", "status"), [(KeyboardInterrupt(), "SIGINT", 130), (SystemExit(143), "SIGTERM", 143)]
)
def test_a_signal_leaves_nothing_and_tells_itself(tmp_path, capsys, monkeypatch, stop, name, status):
    def stopped(*_):
        raise stop

    source = cases.save(tmp_path / "dense", cases.dense_model())
    monkeypatch.setattr(upcycling, "write_shards", stopped)
    assert main(["--model", source, "--output", str(tmp_path / "moe")]) == status
    assert capsys.readouterr().err.endswith(f"stopped by {name}: nothing has been saved\n")
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]
