"""Folders with the files that are mutated: a fit with every method, a killed pass, served models, and whole runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from bmoe_lightning.curvature import Curvature, collect_factors
from bmoe_lightning.experts import down_proj_parameters, find_expert_layers
from bmoe_lightning.laplace import LaplacePosterior
from bmoe_lightning.methods import Method, evaluate, fit_index, fit_methods, get_method, save_snapshot, storage
from bmoe_lightning.methods.base import CurvatureMethod
from bmoe_lightning.methods.options import trial_options
from bmoe_lightning.methods.registry import built_in_names
from bmoe_lightning.models.model_files import TOKENIZER_FILES
from bmoe_lightning.serving import CalibratedModel
from recipes.faults.damaged_files import Part, checked_states
from recipes.faults.lightning_script import Classifier, loader
from recipes.faults.mutations import DAMAGES
from recipes.qwen_obqa.builtin_task import World
from recipes.qwen_obqa.run_folder import FIT_FOLDER

_SNAPSHOTS = 3
_CURVATURE = Curvature(rank=2)
_SAMPLES = 20
# An edited manifest under a digest of its own is the manifest of another model; `tests/serving` has those.
_OF_SERVED = (*DAMAGES, "swap", "tensor")


def class_logits(module: Any, batch: Any) -> tuple[Tensor, Tensor | None]:
    """Logits `[B, K]` and labels of the script's model."""
    return module.class_logits(batch)


def fit_part(folder: Path, methods: Sequence[Method] = ()) -> Part:
    """Two fits of every built-in method that a single model with experts has.

    Args:
        folder: Empty folder.
        methods: Methods to fit instead.
    """
    methods = methods or fitted_methods()
    tested, training = list(loader("test", 4))[:1], list(loader("train"))[:2]
    calibration = list(loader("validation", 104))
    for number, name in enumerate(("one", "other")):
        torch.manual_seed(number)
        module, fit_id = Classifier(), str(number) * 32
        trained = _trained(module)
        snapshots = [folder / name / "snapshots" / f"{fit_id[:8]}-epoch-{n:04d}.safetensors" for n in range(_SNAPSHOTS)]
        for epoch, path in enumerate(snapshots):
            weights = {key: (1 + 0.1 * epoch + 0.01 * number) * value for key, value in trained.items()}
            save_snapshot(path, weights, fit=fit_id)
        before = {key: 0.9 * value for key, value in trained.items()}
        with mock.patch.object(storage, "_LARGE", 1000):  # so that states of methods get files of their own
            fit = fit_methods(
                methods, module, class_logits, training, calibration, prior_mean=before, snapshots=snapshots,
                seed=number, fit_id=fit_id,
            )  # fmt: skip
            storage.save_fit(folder / name, fit, snapshots)

    def read(where: Path) -> Any:
        fit, snapshots = storage.load_fit(where)
        module = Classifier()
        fit.check_weights(module)
        found = evaluate(methods, fit, module, class_logits, tested, snapshots)
        served = LaplacePosterior.load(where / fit_index.POSTERIOR_FILE)
        return {
            "predictions": {name: each.log_probs for name, each in found.items()},
            "scalars": {key: torch.tensor(value) for key, value in fit.scalars(methods).items()},
            "seed": fit.seed,
            "served": served.predict(module, class_logits, tested[0], num_samples=50),
            "calibration": fit.calibration,
        }

    one = folder / "one"
    return Part(
        "fit", one, read, other=folder / "other", further=lambda: [checked_states(methods, storage.load_fit(one)[0])]
    )


def pass_part(folder: Path) -> Part:
    """The sums of a curvature pass that was killed.

    Args:
        folder: Empty folder.
    """
    batches = list(loader("train"))[:2]

    class KilledError(Exception):
        pass

    def until_killed() -> Iterator[Any]:
        yield batches[0]
        raise KilledError

    def read(where: Path, data: Any = batches) -> Any:
        path = where / "curvature.safetensors"
        factors = collect_factors(Classifier(), class_logits, data, rank=2, checkpoint=path, checkpoint_every=1)
        return [layer.tensors() for layer in factors.layers]

    folder.mkdir(parents=True)
    try:
        read(folder, until_killed())
    except KilledError:
        return Part("killed pass", folder, read)
    raise AssertionError("the pass went on without its second batch")


def served_part(run: Path, folder: Path) -> Part:
    """A folder that holds all of a served model.

    Args:
        run: Folder of a finished run of the recipe.
        folder: Folder of the model, missing or empty.
    """
    CalibratedModel.from_pretrained(run / "seed-0").save_pretrained(folder)
    return Part("served model", folder, _answers, kinds=_OF_SERVED)


def run_part(name: str, run: Path) -> Part:
    """The folder of a run's first seed as it is served, in that of the run with two seeds and their model.

    Args:
        name: Name for the table.
        run: Folder of a finished run of the recipe.
    """
    chosen = ("seed-0/*.*", f"seed-0/{FIT_FOLDER}/**/*.*", *(f"model/*/{name}" for name in TOKENIZER_FILES))
    return Part(name, run, lambda where: _answers(where / "seed-0"), chosen, run / "seed-1", _OF_SERVED)


def _answers(folder: Path) -> dict[str, Tensor]:
    served, questions = CalibratedModel.from_pretrained(folder), World().questions("test")[:3]
    return {method.name: served.predict(questions, method.name).log_probs for method in served.methods}


def fitted_methods() -> tuple[Method, ...]:
    """The built-in methods that need one model with experts alone, each with few samples."""
    found: list[Method] = []
    for name in built_in_names():
        method = get_method(name)
        if hasattr(method, "runs") or hasattr(method, "head") or method.needs.lora:  # other runs; other layers
            continue
        small = trial_options(type(method))
        if getattr(method, "num_samples", 0) > _SAMPLES:
            small.setdefault("num_samples", _SAMPLES)
        found.append(replace(method, **small))
    # Two curvatures, so that a fit has a posterior beside the served one.
    other = next(method for method in found if isinstance(method, CurvatureMethod) and method.needs.prior_mean)
    curvatures = {other.name: replace(_CURVATURE, fisher="empirical")}
    return tuple(method.with_defaults(curvatures.get(method.name, _CURVATURE)) for method in found)


def _trained(module: Classifier) -> dict[str, Tensor]:
    layers = find_expert_layers(module)
    return {name: p.detach() for layer in layers for name, p in down_proj_parameters(module, layer).items()}
