"""What each method of a study costs: the fit and the predictions of one at a time, on the stored fine-tuned weights.

In a study the methods share passes over the data, so that no stage of it says what one of them costs.
"""

from __future__ import annotations

import platform
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import lightning as L
import torch
from torch import Tensor

from bmoe_lightning.base_finetuner import Finetuner
from bmoe_lightning.data.questions import draw
from bmoe_lightning.methods import Method, get_method
from bmoe_lightning.trainer.signals import check_sigterm
from bmoe_lightning.utils.distributed import num_processes
from recipes.common.silent_fits import silent_fits
from recipes.paper.method_cost import MOST_SINGLE, OneMethod, Reference
from recipes.paper.outcomes import Mode
from recipes.paper.report import Cost
from recipes.paper.report.compared import read_compared
from recipes.paper.stored_costs import Conditions, StoredCost, read_costs, write_costs
from recipes.qwen_obqa.seed_run import SeedRun
from recipes.qwen_obqa.settings import ResolvedSettings
from recipes.qwen_obqa.sources import Source
from recipes.qwen_obqa.stored_predictions import origin_of_predictions
from recipes.qwen_obqa.stored_weights import keeps_weights

MOST_TRAINING, MOST_CALIBRATION, MOST_TEST = 1024, 512, 256
"""Largest numbers of questions of each split that a method is measured on."""
_SEVERAL = (
    "The study was made on several processes, each of which has a part of the questions and maybe of the weights: what "
    "one of them needs is not what the method needs on one device."
)

Key = tuple[Mode, str]
"""Mode and name of a method."""


def outstanding_costs(output: Path, runs: Mapping[Mode, SeedRun]) -> list[Key]:
    """The methods of finished runs whose costs have to be measured.

    Costs of other data, another seed or other sizes are removed from the file, and all are measured again: so are those
    of another machine where something has to be measured. Costs of a mode without a run stay, and are compared when it
    has one.

    Args:
        output: Folder of the study, which this process has locked.
        runs: The run to measure of each mode.

    Warns:
        UserWarning: If the file of an earlier measurement is damaged; everything is then measured again.
    """
    if num_processes() > 1:
        write_costs(output, (), _SEVERAL)
        return []
    wanted = [(mode, method.name) for mode, run in runs.items() for method in _rows(run)]
    try:
        known = read_costs(output).entries
    except ValueError as error:
        warnings.warn(f"{error} The costs are measured again", stacklevel=2)
        known = ()
    now = {mode: _conditions(run) for mode, run in runs.items()}

    def is_current(entry: StoredCost) -> bool:
        if entry.mode not in runs:
            return True
        path = runs[entry.mode].predictions.folder / Path(entry.predictions).name
        conditions = now[entry.mode]
        return output / entry.predictions == path and entry.conditions.on(conditions) == conditions

    has_all = {(entry.mode, entry.method) for entry in known} >= set(wanted)
    here = next(iter(now.values()))
    # A ratio of memory on two machines says nothing.
    is_here = all(entry.conditions == entry.conditions.on(here) for entry in known)
    if not all(map(is_current, known)) or not (has_all or is_here):
        known = ()
    missing = [key for key in wanted if key not in {(entry.mode, entry.method) for entry in known}]
    if missing:
        write_costs(output, known, _left_out({}, [_words(*key) for key in missing]))
    return missing


def measure_costs(output: Path, runs: Mapping[Mode, SeedRun], outstanding: Sequence[Key]) -> None:
    """Measure what methods of finished runs cost, and store each when it is measured.

    Of the study only the file of costs is written.

    Args:
        output: Folder of the study, which this process has locked.
        runs: The run to measure of each mode.
        outstanding: What `outstanding_costs` has found of these runs, at least one method.
    """
    known = {(entry.mode, entry.method): entry for entry in read_costs(output).entries}
    wanted = {(mode, method.name): method for mode, run in runs.items() for method in _rows(run)}
    keeps = cache(keeps_weights)  # every file is read once
    reasons = {key: runs[key[0]].lost_of(wanted[key], keeps) for key in outstanding}
    lost = {_words(*key): reason for key, reason in reasons.items() if reason is not None}

    def store(entry: StoredCost | None = None) -> None:
        if entry is not None:
            known[entry.mode, entry.method] = entry
        pending = [text for key in wanted if key not in known and (text := _words(*key)) not in lost]
        # Those of other tables, which are not asked for now, too.
        entries = [known[key] for key in dict.fromkeys((*wanted, *known)) if key in known]
        write_costs(output, entries, _left_out(lost, pending))

    print("\nMeasuring what each method costs, one at a time", flush=True)
    for mode, run in runs.items():
        methods = [wanted[key] for key in outstanding if key[0] == mode and _words(*key) not in lost]
        if methods:
            _measure_run(_small(run), methods, partial(_stored, output, mode, run, store))
    if lost:
        store()


def _rows(run: SeedRun) -> list[Method]:
    """The methods of a run that are rows of the report's table."""
    compared = read_compared()
    return [method for method in run.methods if compared.without_part(method.name) is None]


def _words(mode: Mode, name: str) -> str:
    return f"{name} ({mode})"


def _left_out(lost: Mapping[str, str], pending: Sequence[str]) -> str:
    """Sentences on the methods that are not measured: those without files, and those whose turn has not come."""
    sentences = []
    for reason in dict.fromkeys(lost.values()):
        names = ", ".join(name for name, other in lost.items() if other == reason)
        sentences.append(f"Without {names}, whose {reason} the study no longer has.")
    if pending:
        sentences.append(
            f"Without {', '.join(pending)}, since the measurement was stopped; run the command that made the study "
            "again."
        )
    return " ".join(sentences)


def _conditions(run: SeedRun) -> Conditions:
    """Where and on what the methods of a run are measured now."""
    small, settings = _small(run).source, run.settings
    sizes = (len(small.train), len(small.calibration), len(small.test), min(MOST_SINGLE, len(small.test)))
    return Conditions(*_here(settings), run.seed, *sizes, settings.batch_size, settings.eval_batch_size)


def _here(settings: ResolvedSettings) -> tuple[str, str]:
    """The name of this machine, and the device that the runs use, in words."""
    if settings.accelerator != "cpu" and torch.cuda.is_available():
        return platform.node(), torch.cuda.get_device_name()
    return platform.node(), f"the CPU ({torch.get_num_threads()} threads)"


def _small(run: SeedRun) -> SeedRun:
    """The run with no more questions than are measured, and without progress bars."""
    source = run.source
    inputs = max(MOST_CALIBRATION, *(method.needs.calibration_inputs for method in run.methods))
    small: Source = replace(
        source,
        train=draw(source.train, MOST_TRAINING),
        calibration=draw(source.calibration, inputs),
        test=draw(source.test, MOST_TEST),
    )
    return replace(run, source=small, settings=replace(run.settings, quiet=True))


def _stored(
    output: Path, mode: Mode, run: SeedRun, store: Callable[[StoredCost], None], method: Method, cost: Cost
) -> None:
    path = run.predictions.path(method)
    relative = path.relative_to(output).as_posix()
    store(StoredCost(mode, method.name, relative, origin_of_predictions(path), _conditions(run), cost))


def _measure_run(run: SeedRun, methods: Sequence[Method], done: Callable[[Method, Cost], None]) -> None:
    """Measure methods of a run one after the other, with one model, and the reference beside each."""
    name = read_compared().reference
    reference = next((method for method in run.methods if method.name == name), None) or get_method(name)

    def measure(trainer: L.Trainer, module: Finetuner, prior_mean: Mapping[str, Tensor] | None) -> None:
        one = partial(OneMethod, trainer=trainer, module=module, prior_mean=prior_mean, run=run)
        beside = Reference.of(one(reference, run.with_stored_runs(reference)))
        for method in methods:
            check_sigterm(trainer)
            print(f"  {run.output.name}: {method.name}", flush=True)
            done(method, one(method, run.with_stored_runs(method)).cost(beside))

    with silent_fits():
        run.with_trained(measure)
