"""The command: its settings, and a small sample of all faults through it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from recipes.common.cli import UsageError
from recipes.faults.__main__ import main
from recipes.faults.settings import SHARES, STAGES, FaultSettings

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--kills -1", "--kills must be at least 0, got -1"),
        ("--stages=", f"--stages is empty; name some of {', '.join(STAGES)}"),
        ("--stages kills --write p.md", "--write needs the whole table; leave --stages and --dry-run out"),
    ],
)
def test_impossible_values_are_2(capsys, flags, sentence):
    assert main(flags.split()) == 2
    assert capsys.readouterr().err == f"error: {sentence}\n"


def test_an_unknown_stage_is_named(capsys):
    assert main(["--stages", "kils"]) == 2
    assert "must be one of kills, disks, read-only, signals, mutations, got kils" in capsys.readouterr().err


def test_a_dry_run_bounds_the_counts():
    counts = FaultSettings(dry_run=True, kills=2).counts
    assert counts == {"kills": 2, "disks": 4, "read-only": 2, "signals": 6, "mutations": 60}
    assert FaultSettings().counts == {"kills": 100, "disks": 40, "read-only": 12, "signals": None, "mutations": 1000}
    with pytest.raises(UsageError, match="--write"):
        FaultSettings(dry_run=True, write="page.md")


def test_the_help_has_the_counts_of_the_settings(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for settings in (FaultSettings(), FaultSettings(dry_run=True)):
        counts = {**settings.counts, "signals": settings.counts["signals"] or 18}
        kinds = zip(counts.values(), ("kills", "full disks", "folders", "signals", "mutations"), strict=True)
        assert f" {', '.join(f'{count} {kind}' for count, kind in kinds)}: " in shown
    assert sum(SHARES.values()) == 100
    for kind, share in SHARES.items():
        assert f"{share} % {kind}" in shown


@pytest.mark.slow
def test_a_sample_of_all_faults_finds_none(tmp_path):
    pytest.importorskip("matplotlib")
    flags = ["--dry-run", "--quiet", "--output-dir", str(tmp_path / "faults")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "recipes.faults", *flags],
        capture_output=True, text=True, cwd=ROOT, timeout=900, check=False, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    content = json.loads((tmp_path / "faults" / "results.json").read_text())
    assert content["faults"] == []
    counts = {each["kind"]: each["counts"] for each in content["outcomes"]}
    for subject in ("recipe", "Lightning script"):
        for kind in ("killed before a file operation", "on a disk that becomes full", "whose files may not grow"):
            assert counts[f"{subject} {kind}"]["finished"] > 0
    assert counts["recipe stopped by SIGTERM"] == {"finished": 5}
    for kind in ("fit: posterior", "fit: snapshot", "killed pass: sums of a curvature pass", "served model: manifest"):
        assert counts[kind]["refused"] > 0
    assert sum(sum(found.values()) for found in counts.values()) > 300
    assert (tmp_path / "faults" / "report.md").read_text().startswith("# Injected faults\n\n| kind | tried |")
    again = subprocess.run(
        [sys.executable, "-m", "recipes.faults", *flags],
        capture_output=True, text=True, cwd=ROOT, timeout=60, check=False, env=environment,
    )  # fmt: skip
    assert again.stdout == done.stdout  # finished stages are not repeated
