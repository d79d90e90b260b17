"""Where the variance of a study's predictions comes from: the part of each layer and expert, stored in its folder."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from bmoe_lightning.base_finetuner import Finetuner
from bmoe_lightning.laplace.attribution import Attribution, LayerAttribution
from bmoe_lightning.methods import Method
from bmoe_lightning.methods.base import PRIOR_PRECISION
from bmoe_lightning.methods.storage import load_fit
from bmoe_lightning.utils.distributed import num_processes
from bmoe_lightning.utils.file_header import damaged
from bmoe_lightning.utils.safetensors_io import read_tensor_file, write_tensor_file
from recipes.paper.method_cost import class_logits, predicted_batches
from recipes.paper.report import Attributed
from recipes.paper.report.compared import read_compared
from recipes.qwen_obqa.seed_run import SeedRun
from recipes.qwen_obqa.stored_predictions import origin_of_predictions

ATTRIBUTION_FILE = "attribution.safetensors"
_FORMAT = "attribution"
_VERSION = 1
_REMEDY = "run the command that made the study again, which makes it again"


def make_attribution(output: Path, run: SeedRun) -> None:
    """Attribute the variance of a finished run's predictions, unless what is stored is of these predictions.

    It takes one pass over the test questions. Nothing is made on several processes, of a run without the method of
    `Compared.layers`, or of one whose weights are lost.

    Args:
        output: Folder of the study, which this process has locked.
        run: The run.

    Warns:
        UserWarning: If the stored file is damaged; it is then made again.
    """
    method = next((method for method in run.methods if method.name == read_compared().layers), None)
    if method is None or num_processes() > 1 or _is_stored(output, run, method) or run.lost_of(method) is not None:
        return
    print("\nAttributing the variance of the predictions to layers and experts", flush=True)
    found: list[Attribution] = []
    run.with_trained(lambda trainer, module, _: found.append(_attribution(run, method, trainer, module)))
    predictions = run.predictions.path(method)
    tensors: dict[str, Tensor] = {}
    for layer in found[0].layers:
        tensors |= {f"{layer.index}/variance": layer.variance, f"{layer.index}/slots": layer.slots}
    description = {
        "method": method.name,
        "seed": run.seed,
        "predictions": predictions.relative_to(output).as_posix(),
        "origin": origin_of_predictions(predictions),
        "layers": {str(layer.index): layer.name for layer in found[0].layers},
    }
    write_tensor_file(output / ATTRIBUTION_FILE, tensors, format=_FORMAT, version=_VERSION, description=description)


def read_attribution(output: Path) -> Attributed | None:
    """Read what was stored; None if there is nothing, or it is of predictions that the study no longer has.

    Args:
        output: Folder of the study.

    Raises:
        ValueError: If the file is damaged, or of another version.
    """
    path = output / ATTRIBUTION_FILE
    if not path.is_file():
        return None
    file = read_tensor_file(path, format=_FORMAT, version=_VERSION, remedy=_REMEDY)
    try:
        content: dict[str, Any] = file.description
        layers = tuple(_layer(name, int(index), file.tensors) for index, name in content["layers"].items())
        if len({len(layer.variance) for layer in layers}) != 1:
            raise ValueError(f"{len(layers)} layers do not have the same examples")
        found = Attributed(str(content["method"]), int(content["seed"]), layers)
        predictions, origin = str(content["predictions"]), content["origin"]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise damaged(path, _FORMAT, f"it is incomplete ({error!r})", _REMEDY) from error
    try:
        return found if origin_of_predictions(output / predictions) == origin else None
    except FileNotFoundError:
        return None


def _layer(name: str, index: int, tensors: Mapping[str, Tensor]) -> LayerAttribution:
    variance, slots = tensors[f"{index}/variance"], tensors[f"{index}/slots"]
    kinds = (variance.dtype, slots.dtype, variance.dim(), variance.shape)
    if kinds != (torch.float64, torch.int64, 2, slots.shape) or not bool(variance.isfinite().all()):
        raise ValueError(f"layer {index} has {variance.dtype} {tuple(variance.shape)} and {tuple(slots.shape)}")
    return LayerAttribution(name, index, variance, slots)


def _is_stored(output: Path, run: SeedRun, method: Method) -> bool:
    """Whether the stored attribution is of the predictions that a run has now."""
    try:
        found = read_attribution(output)
    except ValueError as error:
        warnings.warn(f"{error} The attribution is made again", stacklevel=3)
        return False
    return found is not None and (found.method, found.seed) == (method.name, run.seed)


def _attribution(run: SeedRun, method: Method, trainer: L.Trainer, module: Finetuner) -> Attribution:
    """The attribution of all test questions, by the stored fit of a method."""
    (curvature,) = method.prediction_curvatures
    fit = load_fit(run.fit_folder, offload=[curvature.digest] if curvature.offload else [])[0]
    posterior = fit.posteriors_for([curvature], module)[curvature.digest]
    posterior = posterior.with_prior_precision(fit.state_of(method)[PRIOR_PRECISION])
    logits = class_logits(trainer)
    return Attribution.joined([posterior.attribute(module, logits, batch) for batch in predicted_batches(trainer)])
