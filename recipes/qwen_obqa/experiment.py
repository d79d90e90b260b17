"""The stages of a run: model and data, all stages of each seed, report."""

from __future__ import annotations

import contextlib
import logging
import shlex
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import huggingface_hub
import transformers

from bmoe_lightning.methods import Method, NeedsError
from bmoe_lightning.utils.distributed import is_rank_zero
from bmoe_lightning.utils.file_header import DamagedFileError
from recipes.common.errors import RecipeError
from recipes.qwen_obqa.distributed import first_then_others, joined
from recipes.qwen_obqa.methods import build_methods
from recipes.qwen_obqa.reporting import report
from recipes.qwen_obqa.run_folder import (
    begin,
    check_start,
    locked_output,
    plain_notes,
    remove_leftovers_of_killed_runs,
    run_identity,
)
from recipes.qwen_obqa.seed_run import SeedRun
from recipes.qwen_obqa.settings import ResolvedSettings
from recipes.qwen_obqa.sources import Source, prepare_source

__all__ = ["RecipeError", "completed_run", "quieten", "run"]


def run(settings: ResolvedSettings) -> None:
    """Run all stages, and print the results table.

    An earlier run in the output folder is resumed if it had the same settings, and replaced if `overwrite` is set.

    Args:
        settings: Resolved settings.

    Raises:
        UsageError: If a method cannot be built.
        RecipeError: If the model or the data cannot be loaded, the earlier run had other settings, or a setting cannot
            be used here.
    """
    started = time.monotonic()
    with plain_notes(), joined(settings):
        quieten()
        with completed_run(settings) as runs:
            if not is_rank_zero():
                return
            output = Path(settings.output_dir)
            report(settings, runs[0].source, output, runs)
            print(f"\nDone in {time.monotonic() - started:.0f} s. Everything is in {output}; compare the methods with")
            print(f"  tensorboard --logdir {shlex.quote(str(output / 'tensorboard'))}", flush=True)


Prepare = Callable[[ResolvedSettings, Sequence[Method]], Source]


@contextlib.contextmanager
def completed_run(
    settings: ResolvedSettings, prepare: Prepare | None = None, *, announce: bool = True
) -> Iterator[list[SeedRun]]:
    """Run all stages but the report; the output folder is locked until the context ends.

    Args:
        settings: Resolved settings.
        prepare: Function that loads or creates model and questions; by default `prepare_source`.
        announce: Whether to print what is run, and whether it is resumed.

    Yields:
        The completed runs of all seeds.

    Raises:
        UsageError: If a method cannot be built.
        RecipeError: As `run`.
    """
    methods, output = build_methods(settings), Path(settings.output_dir)
    with contextlib.ExitStack() as stack:
        resumes, source = first_then_others(lambda: _begun(settings, methods, output, prepare or prepare_source, stack))
        if is_rank_zero() and announce:
            if resumes:
                print(f"Resuming the run in {output}: finished stages are not repeated; --overwrite replaces the run.")
            print(source.banner, flush=True)
        identity = run_identity(output)
        runs = [
            SeedRun(settings, source, methods, output, seed, identity)
            for seed in range(settings.first_seed, settings.first_seed + settings.seeds)
        ]

        def check_exports() -> None:
            for run_of_seed in runs if is_rank_zero() else ():
                run_of_seed.check_export()

        first_then_others(check_exports)
        try:
            for run_of_seed in runs:
                run_of_seed.complete()
        except (DamagedFileError, NeedsError) as error:
            raise RecipeError(str(error)) from error
        yield runs


def _begun(
    settings: ResolvedSettings,
    methods: tuple[Method, ...],
    output: Path,
    prepare: Prepare,
    stack: contextlib.ExitStack,
) -> tuple[bool, Source]:
    """Whether an earlier run is resumed, and model and questions.

    Rank zero locks the folder until the stack is closed, and writes the description of the run.
    """
    stack.enter_context(locked_output(output))
    if is_rank_zero():
        remove_leftovers_of_killed_runs(output)
    resumes = check_start(settings, methods, output)
    source = prepare(settings, methods)
    if is_rank_zero():
        begin(settings, output, source, resumes=resumes)
    return resumes, source


def quieten() -> None:
    """Silence log messages and warnings that would hide the progress bars and the table."""
    transformers.utils.logging.disable_progress_bar()
    # Not each retry: the final failure is reported as one error.
    huggingface_hub.utils.logging.set_verbosity_error()
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # A stop is reported once, by the command.
    logging.getLogger("bmoe_lightning.trainer.signals").setLevel(logging.ERROR)
    for message in (
        ".*does not have many workers.*",
        ".*LeafSpec.*",
        ".*Checkpoint directory.*",
        ".*logging interval.*",
        ".*recommended to use `Trainer.*",  # on several processes; the callback does not count repeated examples
    ):
        warnings.filterwarnings("ignore", message=message)
