"""Predictions on the test split, one file for each method, so that methods can be added to a finished run."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bmoe_lightning.methods import FitResult, Method, Predictions
from bmoe_lightning.methods.options import option_columns
from bmoe_lightning.report import MethodResult
from bmoe_lightning.utils.file_header import damaged
from bmoe_lightning.utils.safetensors_io import TensorFile, opened_tensor_file, read_tensor_file, write_tensor_file

_FORMAT = "predictions"
_VERSION = 1
_REMEDY = "delete it, and run the same command again"
_UNCERTAINTY = "uncertainty/"


@dataclass(frozen=True)
class StoredPredictions:
    """The predictions of one seed.

    Attributes:
        folder: Folder of the files.
        identity: Digest of what the trained weights depend on.
        questions: Digest of the test questions.
    """

    folder: Path
    identity: str
    questions: str

    def has(self, method: Method) -> bool:
        """Whether predictions of a method with exactly these options on exactly these questions are stored.

        Warns:
            UserWarning: If the file is damaged or belongs to a run with other settings; it is then treated as missing.
        """
        path = self.path(method)
        if not path.is_file():
            return False
        try:
            file = _read(path)
        except ValueError as error:
            warnings.warn(f"{error} The test split is evaluated again", stacklevel=2)
            return False
        if file.description.get("run") != self.identity:
            warnings.warn(f"{path} is from a run with other settings. The test split is evaluated again", stacklevel=2)
            return False
        stored = {name: file.description.get(name) for name in ("questions", "options")}
        return stored == {"questions": self.questions, "options": _options(method)}

    def write(self, method: Method, fit: FitResult, predictions: Predictions) -> None:
        """Write the predictions of a method.

        Args:
            method: Method, as the run's settings have it.
            fit: Fit that the predictions were made with.
            predictions: Predictions on the test split.
        """
        description = {
            "run": self.identity,
            "questions": self.questions,
            "options": _options(method),
            "numbers": method.hyperparameters(fit.state_of(method)),
            "warnings": list(predictions.warnings),
        }
        tensors = {
            "log_probs": predictions.log_probs,
            "labels": predictions.labels,
            "logits": predictions.logits,
            **{f"{_UNCERTAINTY}{name}": scores for name, scores in predictions.uncertainty.items()},
        }
        write_tensor_file(
            self.path(method), tensors, format=_FORMAT, version=_VERSION, description=description, fit=fit.fit_id
        )

    def read(self, method: Method, seed: int, ids: tuple[str, ...]) -> MethodResult:
        """Read the predictions of a method.

        Args:
            method: Method, as the run's settings have it.
            seed: Fine-tuning seed.
            ids: Ids of the questions, in order.

        Raises:
            ValueError: If the file is damaged.
        """
        found = read_predictions(self.path(method), method.name, method.label, seed, ids)
        return replace(found, hyperparameters=option_columns(method))

    def logits(self, method: Method) -> torch.Tensor:
        """The logits of the model itself on the test split, `[N, K]` float64."""
        with opened_tensor_file(self.path(method), format=_FORMAT, version=_VERSION, remedy=_REMEDY) as file:
            return file.read("logits")

    def path(self, method: Method) -> Path:
        """The file of a method."""
        return self.folder / f"{method.name}.safetensors"


def read_predictions(path: Path, name: str, label: str, seed: int, ids: tuple[str, ...]) -> MethodResult:
    """Read the predictions of a method from their file, without its options.

    Args:
        path: Path of the file.
        name: Name of the method.
        label: Its display name.
        seed: Fine-tuning seed.
        ids: Ids of the questions, in order.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged.
    """
    file = _read(path)
    return MethodResult(
        method=name,
        label=label,
        seed=seed,
        log_probs=file.tensors["log_probs"],
        target=file.tensors["labels"],
        ids=ids,
        extra=file.description["numbers"],
        warnings=tuple(file.description.get("warnings", ())),
        uncertainty=_uncertainty(file),
    )


def origin_of_predictions(path: Path) -> dict[str, Any]:
    """What the predictions of a file were made with, as JSON values: the run, questions, fit, and the method's options.

    Args:
        path: Path of the file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If its header is damaged.
    """
    with opened_tensor_file(path, format=_FORMAT, version=_VERSION, remedy=_REMEDY) as file:
        return {name: file.description.get(name) for name in ("run", "questions", "options")} | {"fit": file.fit}


def _read(path: Path) -> TensorFile:
    """Read a file of predictions; raises `ValueError` for content that `StoredPredictions.write` does not write."""
    file = read_tensor_file(path, format=_FORMAT, version=_VERSION, remedy=_REMEDY)
    log_probs, logits, labels = (file.tensors.get(name) for name in ("log_probs", "logits", "labels"))
    if log_probs is None or logits is None or labels is None:
        raise damaged(path, _FORMAT, "it lacks a tensor", _REMEDY)
    if log_probs.dim() != 2 or log_probs.shape != logits.shape or labels.shape != log_probs.shape[:1]:
        shapes = [tuple(value.shape) for value in (log_probs, logits, labels)]
        raise damaged(path, _FORMAT, f"its tensors have shapes that do not fit together, {shapes}", _REMEDY)
    if labels.dtype != torch.int64 or not (log_probs.is_floating_point() and logits.is_floating_point()):
        raise damaged(path, _FORMAT, "its tensors have other dtypes", _REMEDY)
    if bool(log_probs.isnan().any()) or not torch.allclose(log_probs.exp().sum(-1), torch.ones(()).to(log_probs)):
        raise damaged(path, _FORMAT, "its probabilities do not sum to one", _REMEDY)
    if any(scores.shape != labels.shape or bool(scores.isnan().any()) for scores in _uncertainty(file).values()):
        raise damaged(path, _FORMAT, "its scores of uncertainty are not one number a prediction", _REMEDY)
    numbers, warned = file.description.get("numbers"), file.description.get("warnings", [])
    if not isinstance(numbers, dict) or not all(isinstance(value, int | float) for value in numbers.values()):
        raise damaged(path, _FORMAT, "it lacks the numbers of the method", _REMEDY)
    if not isinstance(warned, list) or not all(isinstance(line, str) for line in warned):
        raise damaged(path, _FORMAT, "its warnings are no list of sentences", _REMEDY)
    return file


def _uncertainty(file: TensorFile) -> dict[str, torch.Tensor]:
    """Scores of uncertainty by name; none in files of methods without a posterior."""
    tensors = file.tensors.items()
    return {key.removeprefix(_UNCERTAINTY): value for key, value in tensors if key.startswith(_UNCERTAINTY)}


def _options(method: Method) -> dict[str, Any]:
    """The options that affect predictions, as JSON stores them, with the class, since its name may be reused."""
    options = {key: value for key, value in method.options().items() if key != "label"}
    loaded: dict[str, Any] = json.loads(json.dumps({**method.fit_options(), **options}))
    return loaded
