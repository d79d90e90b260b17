"""The output folder of a run: checks before it starts, and whether it resumes an earlier run."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning as L
from lightning.fabric.utilities.exceptions import MisconfigurationException

from bmoe_lightning.curvature.sketch import check_linear
from bmoe_lightning.data import Question
from bmoe_lightning.methods import Method
from bmoe_lightning.methods.fit_index import remove_leftover_files
from bmoe_lightning.models.model_files import TOKENIZER_FILES, FileChange, changed_files, file_digests
from bmoe_lightning.optim import check_half_precision_updates
from bmoe_lightning.utils.atomic_io import remove_all_leftovers, remove_leftovers
from bmoe_lightning.utils.distributed import is_rank_zero, num_processes
from bmoe_lightning.utils.folder_lock import FolderInUseError, locked_folder
from bmoe_lightning.utils.json_io import read_json_file, write_json_file
from bmoe_lightning.utils.messages import first_names
from bmoe_lightning.utils.new_folder import UNFINISHED
from recipes.common.errors import RecipeError
from recipes.qwen_obqa.distributed import trainer_options
from recipes.qwen_obqa.exported_model import check_export
from recipes.qwen_obqa.settings import ResolvedSettings, Settings
from recipes.qwen_obqa.sources import Source

RUN_FILE = "run.json"
FIT_FOLDER = "bayesian_moe"
MEMBER_FITS = f"member-*-{FIT_FOLDER}"
# What a run writes, besides a folder for each seed. The cached small model stays: it does not depend on these settings.
_OWN_FOLDERS = ("tensorboard", "training_curves", "figures")
_OWN_FILES = ("results.json", "results.csv", "results.md", "predictions.jsonl", "label_budget.json")
_KEPT_FOLDER = "model"
_QUESTIONS = "questions"
_REPLACED = "replaced"  # set while the files of an earlier run are removed
_FORMAT = "description of a run"
_VERSION = 1
_TEST_QUESTIONS = "test_questions"
_TEST_LIMIT = "limit_test"
_PRETRAINED = "pretrained_weights"  # hash by seed
_MODEL_FILES = "model_files"  # digests by seed and name
# Settings that may change when a run is resumed, since they do not change trained weights. Seeds may be added: each has
# a folder. Methods may be added: their options are compared with those that they were fitted and evaluated with. The
# evaluation's batch size changes results by rounding alone, and has to be lowered where memory is not enough.
_FREE = (
    "resume", "overwrite", "quiet", "output_dir", "seeds", "first_seed", "curvature_checkpoint_every", "methods", "set",
    "curvature", "zero_shot", "save_model", "eval_batch_size", _TEST_LIMIT,
)  # fmt: skip


def check_start(settings: ResolvedSettings, methods: Sequence[Method], output: Path) -> bool:
    """Check before training what would otherwise fail after hours; files of an earlier run are not changed.

    Args:
        settings: Resolved settings.
        methods: Methods of the run.
        output: Folder of the run; created if missing.

    Returns:
        Whether an earlier run with the same settings is resumed.

    Raises:
        RecipeError: If the folder holds something else or cannot be written, or accelerator, precision or a method's
            options cannot be used here.
    """
    make_folder(output)
    resumes = _earlier_run(settings, output)
    check_export(settings, output, resumes=resumes)
    try:
        if num_processes() > 1:
            for curvature in (curvature for method in methods for curvature in method.curvatures):
                check_linear(curvature.sketch)
        check_half_precision_updates(settings.half_precision_updates)
    except (ValueError, ImportError) as error:
        raise RecipeError(str(error)) from None
    try:
        L.Trainer(
            accelerator=settings.accelerator,
            precision=settings.precision,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            **trainer_options(settings),
        )
    except (MisconfigurationException, ValueError) as error:
        raise RecipeError(
            f"--accelerator {settings.accelerator} with --precision {settings.precision} does not work here: "
            f"{_one_line(error)}"
        ) from None
    return resumes


def make_folder(output: Path) -> None:
    """Create the folder of a run, and check that it can be written.

    Raises:
        RecipeError: If it cannot.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=output).close()
    except OSError as error:
        reason = "it is a file" if output.is_file() else error.strerror
        raise RecipeError(f"--output-dir {output} cannot be written ({reason}); give another one") from None


@contextlib.contextmanager
def locked_output(output: Path) -> Iterator[None]:
    """Create the folder of a run and lock it until the context ends; on rank zero alone.

    Args:
        output: The folder.

    Raises:
        RecipeError: If it cannot be written, or another process uses it.
    """
    with contextlib.ExitStack() as stack:
        if is_rank_zero():
            make_folder(output)
            try:
                stack.enter_context(locked_folder(output))
            except FolderInUseError as error:
                raise RecipeError(f"{error}, or give another --output-dir") from None
        yield


def begin(settings: ResolvedSettings, output: Path, source: Source, *, resumes: bool) -> None:
    """Write the description of the run, once model and questions are loaded; without `resumes` remove an earlier run.

    Args:
        settings: Resolved settings.
        output: Folder of the run.
        source: Model and questions.
        resumes: Whether an earlier run is resumed.

    Raises:
        RecipeError: If an earlier run is resumed, and its questions were different.
    """
    path = output / RUN_FILE
    content = {
        **_lasting(settings),
        _TEST_LIMIT: settings.limit_test,
        _QUESTIONS: questions_fingerprint(source),
        _TEST_QUESTIONS: fingerprint_of(source.test),
    }
    earlier = _read_run(path) if resumes else content
    # Options that were added since have their default, and the identity of the run does not change with them.
    changing = (_TEST_LIMIT, _TEST_QUESTIONS)
    written = {_PRETRAINED: {}, **earlier, **{name: content[name] for name in content if name in (*earlier, *changing)}}
    same_limit = earlier.get(_TEST_LIMIT) == settings.limit_test
    compared = (_QUESTIONS, _TEST_QUESTIONS) if same_limit else (_QUESTIONS,)
    if any(earlier.get(name) != content[name] for name in compared):
        raise RecipeError(
            f"the questions are not those of the earlier run in {output}; give --overwrite to replace that run, or "
            "another --output-dir"
        )
    if not resumes:
        if path.exists():
            # If this process is killed below, the next one neither resumes the earlier run nor refuses the folder.
            _write_run(path, {_REPLACED: True})
        # Only files of the earlier run. Event files must go: those of two runs form one curve.
        for folder in (*output.glob("seed-*"), *(output / name for name in _OWN_FOLDERS)):
            if folder.is_dir():
                shutil.rmtree(folder)
        for name in _OWN_FILES:
            (output / name).unlink(missing_ok=True)
    _write_run(path, written)


@contextlib.contextmanager
def plain_notes() -> Iterator[None]:
    """Show warnings of rank zero as one line each, without file and line number, until the context ends."""

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        if is_rank_zero():
            print(f"note: {_one_line(message)}", file=sys.stderr, flush=True)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def _earlier_run(settings: ResolvedSettings, output: Path) -> bool:
    """Whether the folder holds an earlier run to resume."""
    path = output / RUN_FILE
    remove_leftovers(path)  # of a process that was killed while it wrote the description
    if not path.is_file():
        if any(entry.name != _KEPT_FOLDER for entry in output.iterdir()):
            raise RecipeError(f"{output} is not empty and holds no earlier run; give another --output-dir")
        return False
    if settings.overwrite:
        return False
    found, wanted = _read_run(path), _lasting(settings)
    if found.get(_REPLACED):
        return False
    # An earlier run without an option, which was added since, had its default.
    found = {**_lasting(_defaults(settings)), **found}
    differing = sorted(name for name in wanted if found.get(name) != wanted[name])
    if differing:
        had = ", ".join(f"{name}={found.get(name)!r}" for name in differing)
        raise RecipeError(
            f"the earlier run in {output} had other settings ({had}); give the same ones to resume it, --overwrite to "
            "replace it, or another --output-dir"
        )
    return True


def _read_run(path: Path) -> dict[str, Any]:
    try:
        return read_json_file(path, format=_FORMAT, version=_VERSION).description
    except (ValueError, OSError):
        raise RecipeError(
            f"{path}, which describes the earlier run, is damaged; --overwrite replaces that run, or give another "
            "--output-dir"
        ) from None


def _write_run(path: Path, description: Mapping[str, Any]) -> None:
    write_json_file(path, format=_FORMAT, version=_VERSION, description=json.loads(json.dumps(description)))


def _lasting(settings: ResolvedSettings) -> dict[str, Any]:
    """The settings that a resumed run must share with the earlier one."""
    lasting = {name: value for name, value in asdict(settings).items() if name not in _FREE}
    return lasting | {"processes": num_processes()}


def _defaults(settings: ResolvedSettings) -> ResolvedSettings:
    """The settings of a run of the same kind that gives no other option."""
    return Settings(model=settings.model, data=settings.data, dry_run=settings.dry_run).resolved()


def run_identity(output: Path) -> str:
    """Digest of the settings and questions that trained weights and fits depend on; every stage file has it.

    Args:
        output: Folder of a run that has begun. Its description has the options that there were when the run was first
            made, so that an option that is added later does not change the identity.
    """
    free = (*_FREE, _TEST_QUESTIONS, _PRETRAINED, _MODEL_FILES)
    content = {name: value for name, value in _read_run(output / RUN_FILE).items() if name not in free}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def check_pretrained(output: Path, seed: int, weights: str) -> None:
    """Check that a seed starts from the weights that its finished stages have started from; on rank zero alone.

    Args:
        output: Folder of a run that has begun; it is recorded there if the seed has not started yet.
        seed: Seed of the fine-tuning.
        weights: Hash of the pre-trained weights.

    Raises:
        RecipeError: If they are others, such as those of a small model that was pre-trained again.
    """
    if not is_rank_zero():
        return
    known = _started_with(output, _PRETRAINED, seed, weights)
    if known != weights:
        raise RecipeError(
            f"seed {seed} of the earlier run in {output} started from the pre-trained weights {known}, and the model "
            f"now has {weights}; give --overwrite to replace that run, or another --output-dir"
        )


def check_files(output: Path, seed: int, model: str) -> None:
    """Check that a model has the configuration and the tokenizer that a seed has started with; on rank zero alone.

    Args:
        output: Folder of a run that has begun; they are recorded there if the seed has not started yet.
        seed: Seed of the fine-tuning.
        model: Folder or hub id of the model.

    Raises:
        RecipeError: If a file was changed, added or removed; see `changed_files`.
        ModelUnavailableError: If there is no such model.
    """
    if not is_rank_zero():
        return
    known = _started_with(output, _MODEL_FILES, seed, file_digests(model, TOKENIZER_FILES))
    changes = changed_files(model, known, TOKENIZER_FILES)
    changed = [
        f"{name} ({change.value})" if change is FileChange.NOT_CACHED else name for name, change in changes.items()
    ]
    if changed:
        raise RecipeError(
            f"{first_names(sorted(changed))} of {model} changed after seed {seed} of the earlier run in {output} had "
            "started; restore it, give --overwrite to replace that run, or another --output-dir"
        )


def files_at_start(output: Path, seed: int) -> dict[str, str] | None:
    """The digests that `check_files` has recorded when a seed started; None if it has not.

    Args:
        output: Folder of a run that has begun.
        seed: Seed of the fine-tuning.
    """
    return _read_run(output / RUN_FILE).get(_MODEL_FILES, {}).get(str(seed))


def _started_with(output: Path, name: str, seed: int, value: Any) -> Any:
    """What a seed has started with, which is recorded if it has not started yet."""
    content = _read_run(output / RUN_FILE)
    known = content.get(name, {})
    if str(seed) not in known:
        _write_run(output / RUN_FILE, {**content, name: {**known, str(seed): value}})
    return known.get(str(seed), value)


def remove_leftovers_of_killed_runs(output: Path) -> None:
    """Remove what killed processes left in the folder of a run, which this process has locked."""
    fits = [*output.glob(f"seed-*/{FIT_FOLDER}"), *output.glob(f"seed-*/{MEMBER_FITS}")]
    predictions = output.glob("seed-*/predictions*")
    for folder in (output, *output.glob("seed-*"), *predictions, output / "figures"):
        remove_all_leftovers(folder)
    for folder in fits:
        remove_leftover_files(folder)
    for unfinished in (output / _KEPT_FOLDER).glob(f"{UNFINISHED}*"):
        shutil.rmtree(unfinished)


def questions_fingerprint(source: Source) -> str:
    """Digest of the training and calibration questions, and of the number of classes, to which the test split adds."""
    parts = [[asdict(question) for question in part] for part in (source.train, source.calibration)]
    classes = max(len(question.choices) for question in (*source.train, *source.calibration, *source.test))
    return hashlib.sha256(json.dumps([*parts, classes]).encode()).hexdigest()[:16]


def fingerprint_of(questions: Sequence[Question]) -> str:
    """Digest of the questions of one split."""
    return hashlib.sha256(json.dumps([asdict(question) for question in questions]).encode()).hexdigest()[:16]


def _one_line(message: object) -> str:
    return " ".join(str(message).split())
