"""The further fine-tuning runs that a method predicts with, and the fits to their weights."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bmoe_lightning.methods import Method
from bmoe_lightning.methods.fit_index import has_fit
from bmoe_lightning.methods.storage import load_fit
from bmoe_lightning.utils.distributed import is_rank_zero
from recipes.qwen_obqa.distributed import agreed
from recipes.qwen_obqa.run_folder import MEMBER_FITS
from recipes.qwen_obqa.seed_training import SeedTraining
from recipes.qwen_obqa.stored_weights import SaveTrained, has_weights


@dataclass(frozen=True)
class FurtherRuns:
    """The further fine-tuning runs of one seed, which are numbered from 1.

    Attributes:
        training: Modules, data and trainers of the seed.
    """

    training: SeedTraining

    def completed(self, method: Method) -> Method:
        """The method with the files of the runs that it needs; missing ones are made now.

        Args:
            method: Method, as the run's settings have it.
        """
        count, run_methods = method.needs.runs, method.needs.run_methods
        return with_files(
            method,
            lambda index: self._trained(index, count + 1),
            lambda index: self._fitted(index, count + 1, run_methods),
        )

    def stored(self, method: Method) -> Method:
        """The method with the files of the runs that it needs, where these are; none is made.

        Args:
            method: Method, as the run's settings have it.
        """
        return with_files(method, self.training.weights, self.fit_folder)

    def fit_folder(self, index: int) -> Path:
        """Folder of the fit to the weights of one run.

        Args:
            index: Number of the run.
        """
        return self.training.folder / MEMBER_FITS.replace("*", str(index))

    def _trained(self, index: int, size: int) -> Path:
        """The file with the weights of one run, trained now if it is missing."""
        training, path = self.training, self.training.weights(index)
        if not agreed(has_weights(path, training.stage(index))):
            if is_rank_zero():
                shutil.rmtree(self.fit_folder(index), ignore_errors=True)  # of weights that are trained again
            training.say(f"fine-tuning {_member(index, size)}")
            module, data = training.fresh(index)
            save = SaveTrained(path, training.stage(index))
            training.trainer([save], f"member-{index}", limit_val_batches=0).fit(module, datamodule=data)
            training.detach(module, data)
        return path

    def _fitted(self, index: int, size: int, methods: Sequence[Method]) -> Path:
        """The folder with the fit of some methods to the weights of one run, fitted now if it is missing."""
        training, folder = self.training, self.fit_folder(index)
        if missing := training.unfitted(methods, folder):
            training.say(f"fitting {', '.join(missing)} to {_member(index, size)}")
            training.fit(methods, self._trained(index, size), folder, *training.fresh(index))
        return folder


def _member(index: int, size: int) -> str:
    """What a further run is called; it may be fine-tuned before the run itself."""
    return f"member {index + 1} of {size} of an ensemble (member 1 is the run itself)"


def with_files(method: Method, weights: Callable[[int], Path], fit: Callable[[int], Path]) -> Method:
    """A method with the weights of each further fine-tuning run that it needs, and the folders of the fits to these.

    Args:
        method: Method.
        weights: The file with the weights of a further run, by its index from 1.
        fit: The folder with the fit to these weights, called after all files are there.
    """
    needs = method.needs
    if not needs.runs:
        return method
    indices = range(1, needs.runs + 1)
    files: dict[str, Any] = {"runs": tuple(str(weights(index)) for index in indices)}
    if needs.run_methods:
        files["fits"] = tuple(str(fit(index)) for index in indices)
    return replace(method, **files)


def is_finished(methods: Sequence[Method], folder: Path) -> bool:
    """Whether a folder has a fit of each method; a damaged one stays as it is.

    Args:
        methods: Methods; for none there need not be a fit.
        folder: Folder of the fit.
    """
    if not methods:
        return True
    try:
        fit = load_fit(folder)[0] if has_fit(folder) else None
    except (ValueError, FileNotFoundError):
        return False
    return fit is not None and all(map(fit.is_finished, methods))
