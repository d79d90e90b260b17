"""Predict the questions of a file, batch by batch; what is finished is not repeated."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import islice, tee
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from bmoe_lightning.command.given import served_run, written
from bmoe_lightning.command.partial_file import check_place, finished_rows, locked, resumed
from bmoe_lightning.data.files import file_rows
from bmoe_lightning.data.questions import LETTERS, Question
from bmoe_lightning.data.tasks.base import Row
from bmoe_lightning.data.tasks.registry import get_task, recognise_task
from bmoe_lightning.data.truncation import TRUNCATED, TruncationWarning
from bmoe_lightning.methods.base import Method
from bmoe_lightning.metrics import calibration_values
from bmoe_lightning.metrics.conformal import ConformalScore, check_num_labels
from bmoe_lightning.models.loading import load_tokenizer
from bmoe_lightning.serving import CalibratedModel, method_entry
from bmoe_lightning.serving.calibrated_model import method_of
from bmoe_lightning.serving.loading import Served, check_model_files
from bmoe_lightning.serving.prediction_files import PREDICTION_SUFFIXES, write_prediction_file
from bmoe_lightning.serving.predictions import SET_COLUMN
from bmoe_lightning.serving.questions import question_of
from bmoe_lightning.utils.file_digest import digest_of

_READ = (*PREDICTION_SUFFIXES, ".json")
_COVERAGE: float = 0.9
_SCORE: ConformalScore = "lac"
_SECONDS_BETWEEN_LINES = 30.0


@dataclass(frozen=True)
class _Asked:
    """A question of a file.

    Attributes:
        question: The question.
        has_answer: Whether the file says which choice is right.
        where: File and line, or row.
    """

    question: Question
    has_answer: bool
    where: str


def predict_file(given: argparse.Namespace) -> None:
    """Predict the questions of a file; see `bmoe-lightning predict --help`.

    Args:
        given: Options of the command.

    Raises:
        ValueError: If an option or a row is malformed, or the output exists.
        OSError: If a file cannot be read or written.
    """
    data, output = Path(given.data), Path(given.output)
    _check_files(data, output, overwrite=given.overwrite)
    if given.batch_size < 1:
        raise ValueError(f"--batch-size is {given.batch_size}; it must be at least 1")
    total, num_answers = _checked(data, given.task)  # of all rows, before the model is loaded
    labelled = _checked_labels(given)
    if given.quiet or not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    device, run = _device(given.device), Path(given.run)
    served = served_run(run, verify=False)
    method_of(served.methods, given.method)
    for asked in filter(None, (data, labelled)):
        _check_encoded(asked, given.task, served)
    with locked(output) as partial, warnings.catch_warnings():
        warnings.simplefilter("ignore", TruncationWarning)  # said above, for all rows
        _check_files(data, output, overwrite=given.overwrite)  # another process may have written it before the lock
        model = CalibratedModel.from_pretrained(run, device=device)
        method = model.method(given.method)
        _predict(model, method, given, labelled, partial, total)
        _write(output, partial)
    print(f"{total} predictions of {method.name} are in {output}", flush=True)
    if num_answers == total:
        print(_summary(output), flush=True)


def _predict(
    model: CalibratedModel, method: Method, given: argparse.Namespace, labelled: Path | None, partial: Path, total: int
) -> None:
    """Write the predictions that are not there yet into a partial file."""
    data, output, size = Path(given.data), Path(given.output), given.batch_size
    identity = {
        "data": digest_of(data),
        "task": given.task,
        "fit": model.fitted.fit_id,
        "method": method_entry(method),
        "batch_size": size,
    }
    sets = None
    if labelled is not None:
        identity["sets"] = [digest_of(labelled), _coverage(given), _set_score(given)]
        known = (entry.question for entry in _questions(labelled, given.task))
        sets = model.prediction_sets(
            known, method.name, coverage=_coverage(given), score=_set_score(given), batch_size=size
        )
    with _written(output):
        if given.overwrite:
            os.truncate(partial, 0)
        done = resumed(partial, json.loads(json.dumps(identity)), size)
    remaining, asked = tee(islice(_questions(data, given.task), done, None))
    questions = (entry.question for entry in remaining)
    with _progress(done, total, shown=not given.quiet) as advance:
        for group, found in model.predict_batches(questions, method.name, batch_size=size):
            rows = list(found.rows(group, sets))
            for row, entry in zip(rows, islice(asked, len(rows)), strict=True):
                if entry.has_answer:
                    row["answer"] = LETTERS[entry.question.answer]
            _append(partial, output, rows)
            advance(len(rows))


def _check_files(data: Path, output: Path, *, overwrite: bool) -> None:
    if data.suffix not in _READ:
        raise ValueError(f"--data {data} must be a file in JSON Lines (.jsonl) or parquet (.parquet)")
    if output.suffix not in PREDICTION_SUFFIXES:
        raise ValueError(f"--output {output} must end in {' or '.join(PREDICTION_SUFFIXES)}")
    check_place(output)
    if output.exists() and data.exists() and output.samefile(data):
        raise ValueError(f"--output {output} is the file of --data; give another name")
    if output.exists() and not overwrite:
        raise ValueError(f"--output {output} exists; give --overwrite to replace it, or another name")


def _checked_labels(given: argparse.Namespace) -> Path | None:
    """The file with the labels of prediction sets, every row of which has an answer."""
    if given.sets_from is None:
        if given.coverage is not None or given.set_score is not None:
            raise ValueError("--coverage and --set-score are those of sets; give --sets-from too, or leave them out")
        return None
    labelled, coverage = Path(given.sets_from), _coverage(given)
    _check_sets(labelled, Path(given.data), Path(given.output), coverage)
    count = 0
    for asked in _questions(labelled, given.task):
        count += 1
        if not asked.has_answer:
            raise ValueError(f"{asked.where}: no answer; every question of --sets-from needs the right choice")
    if not count:
        raise ValueError(f"--sets-from {labelled} has no rows; give a file of questions with answers")
    try:
        check_num_labels(count, coverage)
    except ValueError as error:
        raise ValueError(f"--sets-from {labelled}: {error}") from None
    return labelled


def _check_sets(labelled: Path, data: Path, output: Path, coverage: float) -> None:
    if not 0 < coverage < 1:
        raise ValueError(f"--coverage is {coverage}; it must be between 0 and 1, exclusive")
    if output.exists() and labelled.exists() and output.samefile(labelled):
        raise ValueError(f"--output {output} is the file of --sets-from; give another name")
    if labelled.suffix not in _READ:
        raise ValueError(f"--sets-from {labelled} must be a file in JSON Lines (.jsonl) or parquet (.parquet)")
    if labelled.is_file() and digest_of(labelled) == digest_of(data):
        raise ValueError(
            f"--sets-from {labelled} is the file of --data, or a copy; sets of its own labels contain them too often"
        )


def _coverage(given: argparse.Namespace) -> float:
    return _COVERAGE if given.coverage is None else float(given.coverage)


def _set_score(given: argparse.Namespace) -> ConformalScore:
    return _SCORE if given.set_score is None else given.set_score


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (AssertionError, RuntimeError) as error:  # of torch, for a name or a device that is not there
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"--device {name} cannot be used ({reason}); give another, such as cpu, or leave it out"
        ) from None


def _questions(data: Path, task: str | None) -> Iterator[_Asked]:
    """The questions of a file, in order."""
    try:
        of_task = None if task is None else get_task(task)
    except TypeError as error:  # something else that can be imported
        raise ValueError(f"--task {task}: {error}") from None
    for number, (where, row) in enumerate(file_rows(data)):
        identity = str(number)
        if of_task is not None:
            yield _Asked(of_task.read(row, identity, where), True, where)
        else:
            try:
                question = question_of(row, identity, where)
            except ValueError as error:
                raise ValueError(f"{error}{_hint(row)}") from None
            yield _Asked(question, row.get("answer") is not None, where)


def _hint(row: Row) -> str:
    """The option that reads a row with the columns of a data set."""
    if {"question", "choices"} <= row.keys() and not isinstance(row["choices"], Mapping):
        return ""
    try:
        return f"; --task {recognise_task(row).name} reads rows with these columns"
    except ValueError:
        return ""


def _checked(data: Path, task: str | None) -> tuple[int, int]:
    """The number of questions of a file, and of those with an answer; every row is read."""
    total = num_answers = 0
    for asked in _questions(data, task):
        total += 1
        num_answers += asked.has_answer
    if not total:
        raise ValueError(f"--data {data} has no rows; give a file with at least one question")
    return total, num_answers


def _check_encoded(data: Path, task: str | None, served: Served) -> None:
    """Refuse a question that the model cannot be asked, with its place in the file; say which ones lose words."""
    check_model_files(served)  # before its tokenizer is read; all files are verified when the model is loaded
    tokenizer = load_tokenizer(served.tokenizer)
    total, cut = 0, []
    for asked in _questions(data, task):
        total += 1
        try:
            cut += [asked.where] * served.questions.encoded(tokenizer, [asked.question])[1]
        except ValueError as error:
            raise ValueError(f"{asked.where}: {error}") from None
    if cut:
        print(
            f"warning: {len(cut)} of {total} questions of {data} are longer than the {served.questions.max_length} "
            f"tokens of prompts that the model was fine-tuned with; {TRUNCATED}; the first is {cut[0]}",
            file=sys.stderr,
            flush=True,
        )


def _append(partial: Path, output: Path, rows: list[dict[str, Any]]) -> None:
    """Add finished rows to a partial file."""
    with _written(output), partial.open("a", encoding="utf-8") as file:
        file.write("".join(f"{json.dumps(row)}\n" for row in rows))


def _write(output: Path, partial: Path) -> None:
    """Write the output from the rows of a partial file, which is removed."""
    with _written(output):
        write_prediction_file(output, lambda: finished_rows(partial))
        partial.unlink()


def _written(output: Path) -> AbstractContextManager[None]:
    return written(f"--output {output}", output.parent)


def _summary(output: Path) -> str:
    """Accuracy, ECE and NLL, and what its sets are like, of an output whose rows all have an answer."""
    rows = [row for _, row in file_rows(output)]
    width = max(len(row["probabilities"]) for row in rows)
    probabilities = torch.zeros(len(rows), width, dtype=torch.float64)
    for number, row in enumerate(rows):
        probabilities[number, : len(row["probabilities"])] = torch.tensor(row["probabilities"], dtype=torch.float64)
    labels = torch.tensor([LETTERS.index(row["answer"]) for row in rows])
    found = {name.upper(): value for name, value in calibration_values(probabilities.log(), labels).items()}
    if SET_COLUMN in rows[0]:
        found["set size"] = sum(len(row[SET_COLUMN]) for row in rows) / len(rows)
        found["set coverage"] = sum(row["answer"] in row[SET_COLUMN] for row in rows) / len(rows)
    return ", ".join(f"{name} {value:.3f}" for name, value in found.items())


@contextmanager
def _progress(done: int, total: int, *, shown: bool) -> Iterator[Callable[[int], object]]:
    """Show progress on stderr: a bar, or a line now and then where it is no terminal."""
    if shown and sys.stderr.isatty():
        from tqdm.auto import tqdm

        with tqdm(total=total, initial=done, unit="question") as bar:
            yield bar.update
        return
    number, told = done, time.monotonic()

    def advance(count: int) -> None:
        nonlocal number, told
        number += count
        if shown and time.monotonic() - told > _SECONDS_BETWEEN_LINES:
            told = time.monotonic()
            print(f"{number} of {total} questions", file=sys.stderr, flush=True)

    yield advance
