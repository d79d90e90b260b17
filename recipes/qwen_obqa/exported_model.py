"""The fine-tuned model as a folder of transformers: checked before training, written in one step after it."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import lightning as L

from bmoe_lightning.base_finetuner import Finetuner
from bmoe_lightning.methods import apply_snapshot
from bmoe_lightning.methods.snapshots import snapshot_info
from bmoe_lightning.models.loading import load_tokenizer
from bmoe_lightning.utils.new_folder import remove_unfinished
from recipes.common.errors import RecipeError
from recipes.qwen_obqa.saved_model import damaged_file, save_model
from recipes.qwen_obqa.settings import ResolvedSettings

RECORD_FILE = "fine_tuning.json"
"""The model that was fine-tuned, digests of its run and of its trained weights, and one of every other file."""


def export_folder(settings: ResolvedSettings, seed: int) -> Path | None:
    """The folder of a seed's fine-tuned model; None without `save_model`."""
    if settings.save_model is None:
        return None
    folder = Path(settings.save_model)
    return folder if settings.seeds == 1 else folder / f"seed-{seed}"


def check_export(settings: ResolvedSettings, output: Path, *, resumes: bool) -> None:
    """Check before training that the fine-tuned models can be saved, and remove what killed processes have left.

    Args:
        settings: Resolved settings.
        output: Folder of the run.
        resumes: Whether an earlier run is resumed, whose models may be there.

    Raises:
        RecipeError: If a model's folder is inside that of the run, has other content, or cannot be written.
    """
    for seed in range(settings.first_seed, settings.first_seed + settings.seeds):
        folder = export_folder(settings, seed)
        if folder is None:
            return
        inner, outer = folder.resolve(), output.resolve()
        if inner.is_relative_to(outer) or outer.is_relative_to(inner):
            raise RecipeError(
                f"--save-model {folder} must be neither inside nor around --output-dir {output}; give another folder"
            )
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder.parent).close()
            remove_unfinished(folder)
            used = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
        except OSError as error:
            raise RecipeError(f"--save-model {folder} cannot be written ({error.strerror}); give another one") from None
        if used and not (resumes and _record(folder)):
            raise RecipeError(f"--save-model {folder} has other content; give a new folder, or remove this one")


def check_origin(folder: Path, trained: Path, stage: str) -> None:
    """Check before training that a folder of a resumed run has no model of another run.

    Args:
        folder: Folder of the model; it need not exist.
        trained: File with the trained weights, if they are trained already.
        stage: Digest of everything that determines the trained weights.

    Raises:
        RecipeError: If it has.
    """
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    try:
        info = snapshot_info(trained)
    except (OSError, ValueError):  # not trained yet, or trained again
        info = None
    if info is not None and info.fit == stage:
        _check_weights(folder, trained)
    elif _record(folder).get("run") != stage:
        raise _another_model(folder)


def is_exported(folder: Path, trained: Path) -> bool:
    """Whether a folder has the model with the weights of a file.

    Args:
        folder: Folder of the model.
        trained: Existing file with the trained weights.

    Raises:
        RecipeError: If the folder has anything else, or is damaged.
    """
    if not folder.is_dir() or not any(folder.iterdir()):
        return False
    _check_weights(folder, trained)
    if (damaged := damaged_file(folder, RECORD_FILE)) is not None:
        raise RecipeError(f"{damaged} is damaged; remove {folder}, and run the same command again")
    return True


def export(folder: Path, trained: Path, module: Finetuner, trainer: L.Trainer, tokenizer: str) -> None:
    """Write the fine-tuned model, in the precision of the run, and its tokenizer.

    Args:
        folder: Folder of the model, missing or empty.
        trained: File with the trained weights.
        module: Module before training; its model is loaded into main memory.
        trainer: Trainer with the precision of the run.
        tokenizer: Folder or hub id of the tokenizer.

    Raises:
        RecipeError: If the folder cannot be written.
    """
    module.load()
    trainer.precision_plugin.convert_module(module)
    apply_snapshot(module, trained)
    assert module.model is not None
    info = snapshot_info(trained)
    record = {"model": module.model.name_or_path or "", "run": info.fit, "weights": info.digest}
    try:
        save_model(folder, module.model, load_tokenizer(tokenizer), record, RECORD_FILE)
    except OSError as error:
        raise RecipeError(
            f"the fine-tuned model cannot be written to {folder} ({error}); run the same command again once it can"
        ) from None
    _check_weights(folder, trained)


def _check_weights(folder: Path, trained: Path) -> None:
    if _record(folder).get("weights") != snapshot_info(trained).digest:
        raise _another_model(folder)


def _another_model(folder: Path) -> RecipeError:
    return RecipeError(
        f"--save-model {folder} has another model than this run's; give a new folder, or remove this one"
    )


def _record(folder: Path) -> dict[str, Any]:
    """What `export` has recorded in a folder; empty if it has not."""
    try:
        found = json.loads((folder / RECORD_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
