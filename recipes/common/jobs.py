"""Several runs at a time, each in a process of its own with its share of the cores."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from recipes.common.errors import RecipeError

_POLL_SECONDS = 0.2
_SECONDS_TO_STOP = 60


@dataclass(frozen=True)
class Job:
    """A command of this Python whose output goes to a file.

    Attributes:
        name: Name for messages.
        arguments: Arguments of the interpreter.
        log: File of its output.
        after: Name of the job that has to end before it begins; None for none.
    """

    name: str
    arguments: tuple[str, ...]
    log: Path
    after: str | None = None


def run_jobs(jobs: Sequence[Job], at_a_time: int) -> None:
    """Run jobs, some at a time, and print a line when one begins and when it ends.

    If one fails, no other begins, but those that run are waited for: a training that is stopped is lost. If this
    process is stopped, they are stopped too, as by SIGTERM: what they have finished is stored.

    Args:
        jobs: The jobs, in the order in which they begin; one that waits for another lets later ones go first.
        at_a_time: Number of processes.

    Raises:
        RecipeError: If jobs fail; it names each, and the end of its output.
    """
    waiting, running, total = list(jobs), dict[subprocess.Popen[bytes], tuple[Job, float]](), len(jobs)
    environment, failed = {**os.environ, **_threads(at_a_time)}, list[str]()

    def next_job() -> Job | None:
        unfinished = {job.name for job in waiting} | {job.name for job, _ in running.values()}
        return next((job for job in waiting if job.after not in unfinished), None)

    try:
        while running or (waiting and not failed):
            while not failed and len(running) < at_a_time and (job := next_job()) is not None:
                waiting.remove(job)
                print(f"[{total - len(waiting)} of {total}] {job.name}", flush=True)
                job.log.parent.mkdir(parents=True, exist_ok=True)
                with job.log.open("wb") as log:
                    command = [sys.executable, *job.arguments]
                    process = subprocess.Popen(  # noqa: S603  # this interpreter, with arguments of ours
                        command, stdout=log, stderr=subprocess.STDOUT, env=environment
                    )
                running[process] = (job, time.monotonic())
            for process in [process for process in running if process.poll() is not None]:
                job, started = running.pop(process)
                if process.returncode:
                    failed.append(f"{job.name} failed with exit status {process.returncode}: {_end_of(job.log)}")
                    rest = f"; waiting for {', '.join(left.name for left, _ in running.values())}" if running else ""
                    print(f"{job.name} failed{rest}", flush=True)
                else:
                    print(f"{job.name}: {time.monotonic() - started:.0f} s", flush=True)
            time.sleep(_POLL_SECONDS)
    finally:
        for process in running:
            process.terminate()
        for process in running:
            try:
                process.wait(_SECONDS_TO_STOP)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
    if failed:
        raise RecipeError("; ".join(failed))


def jobs_at_a_time(given: int | None, accelerator: str, *, small: bool) -> int:
    """The number of jobs of a study at a time: one, and for a small model on the CPU alone by default several.

    Args:
        given: `--jobs`, or None.
        accelerator: Lightning accelerator.
        small: Whether all models are small ones that a recipe pre-trains.
    """
    # Late: whoever runs jobs need not load torch, which takes seconds.
    import torch

    from bmoe_lightning.utils.distributed import num_processes

    if num_processes() > 1:
        return 1
    on_gpu = accelerator == "gpu" or (accelerator == "auto" and torch.cuda.is_available())
    return given or (default_jobs() if small and not on_gpu else 1)


def default_jobs() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _threads(at_a_time: int) -> dict[str, str]:
    # Processes that spin for each other's cores are several times slower.
    return {"OMP_NUM_THREADS": str(max(1, default_jobs() // at_a_time)), "OMP_WAIT_POLICY": "passive"}


def _end_of(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return f"{lines[-1] if lines else 'no output'} (all of it is in {log})"
