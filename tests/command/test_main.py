"""Options and exit statuses of the command."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import entry_points

import pytest

from bmoe_lightning.command import export_temperature, predict
from bmoe_lightning.command.main import main

HELP = """
import sys
from bmoe_lightning.command.main import main
try:
    main(sys.argv[1:])
except SystemExit as end:
    assert not end.code
print([name for name in ("torch", "transformers", "lightning", "pyarrow") if name in sys.modules])
"""


@pytest.mark.parametrize("command", [(), ("predict",), ("export-temperature",)])
def test_help_imports_nothing_slow(command):
    run = subprocess.run([sys.executable, "-c", HELP, *command, "--help"], capture_output=True, text=True, check=True)
    assert "usage: bmoe-lightning" in run.stdout
    assert run.stdout.splitlines()[-1] == "[]"


def test_the_module_is_the_command():
    run = subprocess.run([sys.executable, "-m", "bmoe_lightning", "--help"], capture_output=True, text=True, check=True)
    assert "export-temperature" in run.stdout


def test_the_command_is_installed():
    found = [entry for entry in entry_points(group="console_scripts") if entry.name == "bmoe-lightning"]
    assert not found or found[0].load() is main


@pytest.mark.parametrize(
    "arguments",
    [
        [], ["other"], ["predict"], ["predict", "--run", "a", "--data", "b"], ["export-temperature", "--run", "a"],
        ["predict", "--run", "a", "--data", "b", "--output", "c", "--batch-size", "x"],
        ["predict", "--run", "a", "--data", "b", "--output", "c", "--other"],
    ],
)  # fmt: skip
def test_wrong_options_are_status_2(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    assert "usage: bmoe-lightning" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "status"), [(None, 0), (ValueError("one\ntwo"), 1), (OSError("full"), 1), (KeyboardInterrupt(), 130)]
)
@pytest.mark.parametrize("command", ["predict", "export-temperature"])
def test_what_cannot_be_done_is_status_1_and_a_stop_130(monkeypatch, capsys, command, error, status):
    def action(given):
        if error is not None:
            raise error

    monkeypatch.setattr(predict, "predict_file", action)
    monkeypatch.setattr(export_temperature, "export_temperature", action)
    options = ["--data", "b", "--output", "c"] if command == "predict" else ["--method", "temperature"]
    assert main([command, "--run", "a", *options]) == status
    said = capsys.readouterr().err
    assert said == {0: "", 1: f"error: {' '.join(str(error).split())}\n"}.get(status, said)
    assert "Traceback" not in said
    if status == 130:
        assert ("to resume" in said) == (command == "predict")
