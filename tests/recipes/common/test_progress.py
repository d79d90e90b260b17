"""Progress of steps: a bar in a terminal, lines in a log, nothing if it is not shown."""

from __future__ import annotations

import pytest

from recipes.common.progress import step_progress


def steps(monkeypatch, *, shown=True):
    now = [0.0]
    monkeypatch.setattr("bmoe_lightning.trainer.progress.time.monotonic", lambda: now[0])
    with step_progress("Reading", 4, shown=shown) as advance:
        for step in range(6):
            now[0] += 20
            advance(f"loss {step}")


def test_a_line_every_half_minute_in_a_log(monkeypatch, capsys):
    steps(monkeypatch)
    assert capsys.readouterr().err.splitlines() == [
        "Reading: 2/4, 0:40 elapsed, 0:40 left, loss 1",
        "Reading: 4/4, 1:20 elapsed, 0:00 left, loss 3",
        "Reading: 6/4, 2:00 elapsed, 0:00 left, loss 5",
    ]


@pytest.mark.parametrize("terminal", [True, False])
def test_nothing_if_it_is_not_shown(monkeypatch, capsys, terminal):
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal, raising=False)
    steps(monkeypatch, shown=False)
    assert capsys.readouterr().err == ""


def test_a_bar_in_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    steps(monkeypatch)
    last = capsys.readouterr().err.rstrip().split("\r")[-1]
    assert last.startswith("Reading: 100%")
    assert "6/6" in last
    assert "loss 5" in last
