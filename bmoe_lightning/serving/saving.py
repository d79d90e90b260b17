"""Write a served model into one folder that holds all of it."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bmoe_lightning.experts.wrappers.peft import is_adapter
from bmoe_lightning.methods.base import Method
from bmoe_lightning.methods.fit_index import SNAPSHOT_FOLDER
from bmoe_lightning.methods.storage import load_fit, save_fit
from bmoe_lightning.serving.manifest import Manifest
from bmoe_lightning.serving.method_entries import FITS, RUNS, method_entry, paths_of, with_paths
from bmoe_lightning.serving.model_card import model_card
from bmoe_lightning.utils.file_digest import digest_of
from bmoe_lightning.utils.new_folder import new_folder

if TYPE_CHECKING:
    from bmoe_lightning.serving.calibrated_model import CalibratedModel

_FIT, _MEMBERS = "bayesian_moe", "members"


def save(served: CalibratedModel, folder: Path) -> None:
    """Write a served model; see `CalibratedModel.save_pretrained`.

    Args:
        served: The model.
        folder: Folder, missing or empty.

    Raises:
        ValueError: If the model has adapters, or the folder has other content.
        OSError: If it cannot be written.
    """
    adapter = next((name for name, module in served.model.named_modules() if is_adapter(module)), None)
    if adapter is not None:
        raise ValueError(
            f"the model has adapters of PEFT, {adapter!r} for one, which its own files do not hold; serve it from the "
            "folder of its run, or merge the adapters and fit methods to the merged weights"
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} has other content; give a new folder, or remove this one")
    with new_folder(folder) as target:
        served.model.save_pretrained(target)
        served.tokenizer.save_pretrained(target)
        fit = target / _FIT
        save_fit(fit, served.fitted, [_copied(path, fit / SNAPSHOT_FOLDER / path.name) for path in served.snapshots])
        methods = [_with_copies(method, target) for method in served.methods]
        manifest = Manifest(
            model=".",
            tokenizer=".",
            fit=_FIT,
            questions=served.questions,
            methods=tuple(method_entry(method) for method in methods),
            precision=served.precision,
            data=served.data,
            results=served.results,
        )
        files = sorted(path for path in target.rglob("*") if path.is_file())
        digests = {path.relative_to(target).as_posix(): digest_of(path) for path in files}
        replace(manifest, sha256=digests).write(target)
        # Without a digest: people complete a model card by hand.
        (target / "README.md").write_text(model_card(served), encoding="utf-8")


def _with_copies(method: Method, target: Path) -> Method:
    """The method with copies of the files of further runs, at paths relative to the target."""
    found = paths_of(method)
    folder = target / _MEMBERS / method.name
    runs = [_copied(path, folder / f"{number}{path.suffix}") for number, path in enumerate(found[RUNS], 1)]
    fits = [_copied_fit(path, folder / f"{number}") for number, path in enumerate(found[FITS], 1)]
    return with_paths(method, {RUNS: _relative(runs, target), FITS: _relative(fits, target)})


def _relative(paths: Sequence[Path], target: Path) -> list[Path]:
    return [path.relative_to(target) for path in paths]


def _copied(path: Path, to: Path) -> Path:
    to.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(path, to)
    return to


def _copied_fit(path: Path, to: Path) -> Path:
    fit: Any = load_fit(path)[0]
    save_fit(to, fit)
    return to
