"""What the predictions of every method cost where they are served: time and memory relative to a plain forward pass."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from bmoe_lightning import LaplacePosterior
from bmoe_lightning.curvature import Curvature
from bmoe_lightning.experts import down_proj_parameters, expert_parameters
from bmoe_lightning.experts.taps import Taps
from bmoe_lightning.laplace import copied_examples
from bmoe_lightning.methods import Method, fit_methods, get_method, method_names, save_snapshot
from bmoe_lightning.methods.evaluation import Predictor
from bmoe_lightning.methods.fit_result import FitResult
from bmoe_lightning.methods.options import trial_options
from bmoe_lightning.methods.storage import save_fit
from recipes.benchmark.measure import Amount, Ratio, Section
from recipes.benchmark.workload import Workload
from recipes.common.peak_memory import peak_memory
from recipes.common.silent_fits import silent_fits
from recipes.common.timing import Action, in_turn, seconds, synchronise, without_garbage_collection

BATCHES = (1, 32)
"""Numbers of examples of a served batch."""
SAMPLES = 8
"""Number of samples of methods that sample weights or routes."""
_FORWARD_BAR = 1.02
_FIXED_BAR = 0.05
_MANY_ROUNDS, _FEW_ROUNDS = 16, 6  # of short computations, and of those of which the bound is close
_COPIED_TOKENS = (8, 16, 32, 64, 128)
_FITTED_EXAMPLES, _FITTED_TOKENS = 128, 4
_SAMPLES_OPTION, _CURVATURE_OPTION = "num_samples", "curvature"


def measure_serving(work: Workload, repeats: int) -> Section:
    """Fit every method to random weights, and time and weigh its predictions.

    Args:
        work: Model, and a batch of which each example is a question.
        repeats: Number of rounds; half as many for batches of several questions.
    """
    with tempfile.TemporaryDirectory() as folder, silent_fits():
        fitted = _Fitted.of(work, Path(folder))
        predictors = {method.name: fitted.predictor(method) for method in fitted.methods}
        ratios: list[Ratio] = []
        amounts: list[Amount] = []
        for size in BATCHES:
            batch = fitted.batch(size)
            actions: dict[str, Action] = {"forward": partial(fitted.forward, batch)}
            for name, predictor in predictors.items():
                actions[name] = partial(predictor.predict, work.model, work.class_logits(), batch)
            peaks = {name: fitted.megabytes(action) for name, action in actions.items()}  # which warms up, too
            rounds = repeats if size == 1 else max(1, repeats // 2)
            times = in_turn(actions, rounds, work.device, warm_up=False)
            for method in fitted.methods:
                name = time_name(method.label, size)
                if method.cost != Method.cost or method.is_ensemble:
                    ratios.append(Ratio(name, times[method.name], times["forward"]))
                    continue
                # Alone with the forward pass, in turn: what ran before shifts times by more than the bound.
                both = {method.name: actions[method.name], "forward": actions["forward"]}
                pairs = in_turn(both, max(_MANY_ROUNDS if size == 1 else _FEW_ROUNDS, rounds), work.device)
                ratios.append(Ratio(name, pairs[method.name], pairs["forward"], _FORWARD_BAR))
            if size == 1:
                ratios += _fixed(work, fitted.posterior, batch, size, repeats)
                ratios += _copies(work, fitted.posterior, repeats)
            plain = peaks["forward"]
            amounts.append(Amount(memory_name(None, size), "s", times["forward"]))
            amounts.append(Amount(memory_name(None, size), "MB", (plain,)))
            for method in fitted.methods:
                more = peaks[method.name] - plain
                amounts.append(Amount(memory_name(method.label, size), "MB", (more,)))
    return Section(
        "serving",
        "Predictions where they are served / plain forward pass",
        (
            f"Shape: {work.shape}. Random weights; methods with samples take {SAMPLES}, ensembles have two members.",
            f"Left out, since they need another model: {', '.join(fitted.left_out)}.",
            "The fixed part is what a prediction of one question takes before its forward pass, and between that and "
            "its first backward pass: checks of weights and logits, and the set-up of taps.",
        ),
        ratios=tuple(ratios),
        amounts=tuple(amounts),
    )


def time_name(label: str, size: int) -> str:
    """The name of the ratio of a method's time to that of a plain forward pass."""
    return f"{label} / plain forward, batch of {size}"


def memory_name(label: str | None, size: int) -> str:
    """The name of the memory of a method beyond that of a plain forward pass, or of that pass."""
    return f"plain forward, batch of {size}" if label is None else f"{label}, batch of {size}, beyond that"


def _fixed(work: Workload, posterior: LaplacePosterior, batch: Any, size: int, repeats: int) -> list[Ratio]:
    """What a linearised prediction takes beyond its floor, and its fixed part, relative to a forward pass."""
    alone, rounds = _with_batch(work, batch), max(_MANY_ROUNDS, repeats)
    times = in_turn(
        {
            "prediction": partial(posterior.predict, work.model, work.class_logits(), batch),
            "floor": alone.floor,
            "forward": alone.forward,
        },
        rounds,
        work.device,
    )
    fixed, forward = [], []
    for _ in range(rounds):
        with without_garbage_collection():
            fixed.append(_seconds_around(work, posterior, batch))
            forward.append(seconds(alone.forward, work.device))
    return [
        Ratio(f"linearised prediction / its floor, batch of {size}", times["prediction"], times["floor"]),
        Ratio(
            f"fixed part of a linearised prediction / plain forward, batch of {size}",
            tuple(fixed),
            tuple(forward),
            _FIXED_BAR,
        ),
    ]


def _copies(work: Workload, posterior: LaplacePosterior, repeats: int) -> list[Ratio]:
    """Predictions of one question on copies of it, relative to those with a backward pass for each contrast."""
    ratios = []
    for tokens in _COPIED_TOKENS:
        question = _questions(work, 1, tokens, 2)
        predict = partial(posterior.predict, work.model, work.class_logits(), question)
        times = in_turn(
            {"copies": partial(_on_copies, tokens, predict), "passes": predict},
            max(_MANY_ROUNDS, repeats),
            work.device,
        )
        name = f"one question of {tokens} tokens: one backward pass on copies / a pass for each contrast"
        ratios.append(Ratio(name, times["copies"], times["passes"]))
    return ratios


def _on_copies(tokens: int, predict: Action) -> None:
    """Predict on copies of an example of so many tokens."""
    with copied_examples(tokens):
        predict()


def _seconds_around(work: Workload, posterior: LaplacePosterior, batch: Any) -> float:
    """Seconds of a prediction before its forward pass, and between that and its first backward pass."""
    marks: list[float] = []

    def mark() -> None:
        synchronise(work.device)
        marks.append(time.perf_counter())

    def class_logits(model: Any, given: Any) -> tuple[Tensor, Tensor | None]:
        mark()
        found = work.class_logits()(model, given)
        mark()
        return found

    def gradients(*args: Any) -> list[Tensor]:
        mark()
        return backward_pass(*args)

    backward_pass = Taps.gradients
    with mock.patch.object(Taps, "gradients", gradients):
        mark()
        posterior.predict(work.model, class_logits, batch)
    start, forward, end, backward = marks[:4]
    return forward - start + backward - end


def _with_batch(work: Workload, batch: Mapping[str, Tensor]) -> Workload:
    """The same model with another batch."""
    other = copy(work)
    other.batch = dict(batch)
    return other


@dataclass(frozen=True)
class _Fitted:
    """Methods that were fitted to the weights of a workload.

    Attributes:
        work: The workload.
        methods: The methods.
        fit: Their fit.
        snapshots: Snapshots for ensembles.
        posterior: A posterior over all layers.
        left_out: Names of methods that cannot be fitted to this model.
    """

    work: Workload
    methods: tuple[Method, ...]
    fit: FitResult
    snapshots: tuple[Path, ...]
    posterior: LaplacePosterior
    left_out: tuple[str, ...]

    @classmethod
    def of(cls, work: Workload, folder: Path) -> _Fitted:
        curvature = Curvature(rank=work.shape.rank)
        known = [_cheap(get_method(name)) for name in method_names()]
        methods = [method.with_defaults(curvature) for method in known if not method.needs.lora]
        weights = {name: p for layer in work.layers for name, p in expert_parameters(work.model, layer).items()}
        count = max(method.needs.snapshots for method in methods)
        snapshots = [folder / f"snapshot-{number}.safetensors" for number in range(max(2, count))]
        for number, path in enumerate(snapshots):
            save_snapshot(path, {name: value * (1 + 1e-3 * number) for name, value in weights.items()})
        data, held_out = _data(work, 0), _data(work, 1)
        prior_mean = {
            name: 0.99 * parameter.detach().cpu()
            for layer in work.layers
            for name, parameter in down_proj_parameters(work.model, layer).items()
        }
        trained = [parameter for layer in work.layers for parameter in expert_parameters(work.model, layer).values()]
        fit = partial(
            fit_methods,
            model=work.model,
            class_logits=work.class_logits(),
            training=data,
            calibration=held_out,
            prior_mean=prior_mean,
            trained=trained,
        )
        run = folder / "run.safetensors"
        save_snapshot(run, weights)
        completed = []
        for parameter in trained:
            parameter.requires_grad_(True)  # which tells what was trained
        for method in methods:
            changed: dict[str, Any] = {}
            if method.needs.runs:
                changed["runs"] = (str(run),)
            if method.needs.run_methods:
                save_fit(folder / method.name, fit(method.needs.run_methods))
                changed["fits"] = (str(folder / method.name),)
            completed.append(replace(method, **changed))
        completed += _of_last_quarter(completed, work)
        found = fit(completed, snapshots=snapshots)
        for parameter in trained:
            parameter.requires_grad_(False)
        posterior = found.served_posterior(curvature.digest)
        left_out = tuple(method.name for method in known if method.needs.lora)
        return cls(work, tuple(completed), found, tuple(snapshots), posterior, left_out)

    def predictor(self, method: Method) -> Predictor:
        """What predicts with a method."""
        return Predictor(method, self.fit, self.snapshots)

    def batch(self, size: int) -> dict[str, Tensor]:
        """A batch of questions."""
        return _questions(self.work, size, self.work.shape.tokens, 2)

    def forward(self, batch: Mapping[str, Tensor]) -> None:
        """A plain forward pass."""
        with torch.no_grad():
            self.work.class_logits()(self.work.model, batch)

    def megabytes(self, action: Action) -> float:
        """Peak memory beyond the model and what is loaded."""
        with peak_memory(self.work.device, self.work.tensors()) as memory:
            action()
            return memory.peak / 1e6


def _cheap(method: Method) -> Method:
    """The method with the options of a trial, since its fit is not measured, and the number of samples of all."""
    cheap = trial_options(type(method))
    if any(entry.name == _SAMPLES_OPTION for entry in fields(method)) and _SAMPLES_OPTION in cheap:
        cheap[_SAMPLES_OPTION] = SAMPLES
    return replace(method, **cheap)


def _of_last_quarter(methods: Sequence[Method], work: Workload) -> list[Method]:
    """The first method with a posterior, over the last quarter of the layers alone."""
    indices = [layer.index for layer in work.layers]
    skipped = tuple(indices[: len(indices) - max(1, len(indices) // 4)])
    first = next(m for m in methods if getattr(m, _CURVATURE_OPTION, None) is not None and m.needs.calibration_labels)
    changed: dict[str, Any] = {
        _CURVATURE_OPTION: replace(first.curvatures[0], skip_layers=skipped),
        "name": f"{first.name}_last_quarter",
        "label": f"{first.label}, last quarter of layers",
    }
    return [replace(first, **changed)] if skipped else []


def _questions(work: Workload, size: int, tokens: int, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = work.shape
    ids = torch.randint(shape.vocabulary, (size, tokens), generator=generator)
    labels = torch.randint(shape.classes, (size,), generator=generator)
    return {"ids": ids.to(work.device), "labels": labels.to(work.device)}


def _data(work: Workload, seed: int) -> list[dict[str, Tensor]]:
    """Labelled batches, enough for every method; of few tokens, since fits are not measured."""
    shape = work.shape
    count, tokens = -(-_FITTED_EXAMPLES // shape.examples), min(_FITTED_TOKENS, shape.tokens)
    return [_questions(work, shape.examples, tokens, 100 * seed + number) for number in range(3, 3 + count)]
