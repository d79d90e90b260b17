"""Kills runs of the recipe at file operations or at times, completes them, and compares with an undisturbed run.

    python -m tests.kill_runs FOLDER [--events N] [--random N] [--seed N]

forks a child for every run, so that libraries are imported once. `--events 0` kills at every file operation.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import threading
import time
import traceback
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch.utils.tensorboard import SummaryWriter  # noqa: F401  (imported once, before the forks)

from bmoe_lightning.methods.storage import load_fit
from bmoe_lightning.report import tensorboard
from bmoe_lightning.utils.safetensors_io import read_tensor_file
from recipes.qwen_obqa import experiment  # noqa: F401
from recipes.qwen_obqa.__main__ import main

FLAGS = (
    "--dry-run", "--quiet", "--accelerator", "cpu", "--methods", "map,temperature,laplace_evidence,checkpoint_ensemble",
    "--limit", "16", "--epochs", "2", "--batch-size", "8", "--eval-batch-size", "8",
    "--curvature-checkpoint-every", "1", "--zero-shot",
)  # fmt: skip
_SAVED = "-saved"  # the fine-tuned model, beside the folder of its run
_WRITES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink", "os.utime"}


def count_writes(folder: Path, kill_at: int | None, seen: list[int]) -> None:
    """Count the file operations in a folder that change it, and kill the process before one of them."""
    inside = str(folder)

    def hook(event: str, args: tuple) -> None:
        if event == "open":
            changes = isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        else:
            changes = event in _WRITES
        if changes and isinstance(args[0], (str, bytes, os.PathLike)) and os.fsdecode(args[0]).startswith(inside):
            if len(seen) == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            seen.append(0)

    sys.addaudithook(hook)


def draw_nothing() -> None:
    """Leave out the drawing of figures, most of a short run's time; their files are still written."""
    image = torch.zeros(3, 4, 4, dtype=torch.uint8)
    tensorboard.figure_image = lambda figure: image.numpy()
    Figure.savefig = lambda self, target, **_: target.write(b"figure")


def forked(folder: Path, *, kill_at: int | None = None, after: float | None = None, flags=FLAGS) -> tuple[int, int]:
    """Run the recipe in a child process; its wait status, and the number of file operations."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        log = os.open(f"{folder}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        if after is not None:
            threading.Timer(after, os.kill, (os.getpid(), signal.SIGKILL)).start()
        seen: list[int] = []
        count_writes(folder, kill_at, seen)
        torch.manual_seed(0)
        status = 1
        try:
            status = main([*flags, "--output-dir", str(folder), "--save-model", f"{folder}{_SAVED}"])
        except BaseException:  # noqa: BLE001  (the child ends below)
            traceback.print_exc()
        os.write(writing, str(len(seen)).encode())
        sys.stdout.flush()
        os._exit(status)
    os.close(writing)
    _, status = os.waitpid(pid, 0)
    with os.fdopen(reading) as pipe:
        return status, int(pipe.read() or 0)


def content(folder: Path) -> dict[str, str]:
    """Digests of everything that a run computes; random ids and times are left out."""
    found = {"results": json.dumps(json.loads((folder / "results.json").read_text())["rows"])}
    for name in ("results.csv", "results.md", "predictions.jsonl"):
        found[name] = (folder / name).read_text()
    for path in sorted((folder / "figures").glob("*.png")):
        found[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    tensors = {}
    for seed in sorted(folder.glob("seed-*")):
        for path in sorted([*seed.glob("*.safetensors"), *seed.glob("predictions/*.safetensors")]):
            kind = "predictions" if path.parent.name == "predictions" else "snapshot"
            file = read_tensor_file(path, format=kind, version=1)
            tensors |= {f"{path.name} {name}": value for name, value in file.tensors.items()}
        fit, snapshots = load_fit(seed / "bayesian_moe")
        for name, method in fit.methods.items():
            tensors |= {f"{name}.{key}": value for key, value in method.state.items()}
        for posterior in fit.posteriors.values():
            for layer in posterior.factors.layers:
                tensors |= {f"{layer.name}.{key}": value for key, value in layer.tensors().items()}
        for number, path in enumerate(snapshots):
            file = read_tensor_file(path, format="snapshot", version=1)
            tensors |= {f"snapshot {number} {name}": value for name, value in file.tensors.items()}
    found |= {name: hashlib.sha256(t.contiguous().numpy().tobytes()).hexdigest() for name, t in tensors.items()}
    for path in Path(f"{folder}{_SAVED}").iterdir():
        content = path.read_bytes().replace(str(folder).encode(), b"")  # the record names the model that was trained
        found[f"saved {path.name}"] = hashlib.sha256(content).hexdigest()
    return found


def leftovers(folder: Path) -> list[str]:
    """Names of files that a completed run should not have."""
    found = [path for path in folder.rglob("*") if path.name.endswith(".tmp") or path.name.startswith(".unfinished-")]
    found += folder.rglob("curvature_state*")
    found += folder.parent.glob(f".unfinished-{folder.name}{_SAVED}*")
    for place in (*folder.glob("tensorboard"), *folder.glob("tensorboard/*"), *folder.glob("training_curves/*")):
        events = list(place.glob("events.*"))
        found += events[1:]
    found += list(folder.glob("seed-*/bayesian_moe/methods-*"))[1:]
    return [str(path.relative_to(folder.parent)) for path in found]


def differences(folder: Path, expected: dict[str, str]) -> list[str]:
    """What differs from an undisturbed run, and what a killed process left."""
    found = content(folder)
    names = [name for name in sorted(found.keys() | expected.keys()) if found.get(name) != expected.get(name)]
    return [*names, *leftovers(folder)]


def trial(work: Path, name: str, model: Path, expected: dict[str, str], **kill) -> str | None:
    """Kill a run, complete it by the same command, and compare; the reason if it failed."""
    folder = work / name
    if model.is_dir():
        shutil.copytree(model, folder / "model")
    status, _ = forked(folder, **kill)
    again, _ = forked(folder)
    log = Path(f"{folder}.log")
    text = log.read_text()
    log.unlink()
    if again != 0:
        return f"killed with {status}, then {again}: {text[-500:]}"
    wrong = differences(folder, expected)
    if wrong:
        return f"differs in {wrong[:5]}"
    shutil.rmtree(folder)
    shutil.rmtree(f"{folder}{_SAVED}")
    return None


def run_all(work: Path, *, events: int | None, times: int, seed: int, say=print) -> list[str]:
    """Kill runs at file operations and at times; returns the failures.

    Args:
        work: Empty folder.
        events: Number of file operations to kill at, evenly spaced; 0 for all, None for none.
        times: Number of kills at random times.
        seed: Seed of the times.
    """
    torch.set_num_threads(1)
    draw_nothing()
    started = time.monotonic()
    status, count = forked(work / "whole")
    assert status == 0, (work / "whole.log").read_text()[-3000:]
    duration = time.monotonic() - started
    expected = content(work / "whole")
    nothing = work / "no model"
    say(f"{count} file operations, {duration:.1f} s")
    kills: list[dict] = []
    if events is not None:
        step = 1 if events == 0 else max(1, count // events)
        kills += [{"kill_at": number} for number in range(0, count, step)]
    generator = random.Random(seed)
    kills += [{"after": generator.uniform(0, duration)} for _ in range(times)]
    failures = []
    for number, kill in enumerate(kills):
        failed = trial(work, f"run-{number}", nothing, expected, **kill)
        if failed:
            failures.append(f"{kill}: {failed}")
            say(failures[-1])
        if number % 20 == 19:
            say(f"{number + 1} of {len(kills)} kills, {len(failures)} failures, {time.monotonic() - started:.0f} s")
    say(f"{len(kills)} kills, {len(failures)} failures")
    return failures


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--events", type=int)
    parser.add_argument("--random", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    given.folder.mkdir(parents=True)
    failed = run_all(
        given.folder, events=given.events, times=given.random, seed=given.seed, say=lambda text: print(text, flush=True)
    )
    sys.exit(bool(failed))
