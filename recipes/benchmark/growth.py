"""Scaling of time and memory with the sizes of a problem."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial

import torch

from bmoe_lightning import LaplacePosterior
from recipes.benchmark.measure import Amount, Growth, Section, batch_in_turn, peak_megabytes
from recipes.benchmark.workload import Preset, Shape, Workload, along
from recipes.common.timing import in_turn

# Above one by the error of a fit over few points.
_LINEAR_BAR = 1.1
_LINEAR = ("tokens of an example", "examples", "experts")


def measure_growth(preset: Preset, repeats: int, device: torch.device, say: Callable[[str], None]) -> Section:
    """Measure curvature and prediction along every axis and fit `size^p`."""
    points: dict[tuple[str, str, str], list[tuple[int, tuple[float, ...]]]] = {}
    seen: dict[Shape, dict[tuple[str, str], tuple[float, ...]]] = {}
    for axis, size, shape in along(preset):
        if shape not in seen:
            say(f"growth: {axis} = {size}")
            seen[shape] = measure_shape(shape, repeats, device)
        for (name, unit), values in seen[shape].items():
            points.setdefault((name, axis, unit), []).append((size, values))
    growth = tuple(
        Growth(
            name,
            axis,
            unit,
            tuple(size for size, _ in measured),
            tuple(statistics.median(values) for _, values in measured),
            tuple(values for _, values in measured),
            _LINEAR_BAR if axis in _LINEAR else None,
        )
        for (name, axis, unit), measured in points.items()
        if not name.startswith("floor")
    )
    base = seen[preset.growth]
    floor = base["floor", "MB"][0]
    amounts = [Amount("activations and gradients of one batch (the floor's peak)", "MB", (floor,))]
    for name in ("curvature", "prediction"):
        beyond = max(0.0, base[name, "MB"][0] - floor)
        amounts.append(Amount(f"{name}: what its peak has beyond that", "MB", (beyond,)))
    return Section(
        "growth",
        "Growth of time and memory",
        (
            f"From {preset.growth}; curvature is mc with the Nystrom sketch, width d is the hidden width with experts "
            "half as wide. Exponents are least-squares slopes in logarithms.",
            "Time is that of a batch. Memory is the peak beyond model and batch of a whole call on one batch: "
            "activations, transients and, of curvature, sketches and their decomposition.",
        ),
        amounts=tuple(amounts),
        growth=growth,
    )


def measure_shape(shape: Shape, repeats: int, device: torch.device) -> dict[tuple[str, str], tuple[float, ...]]:
    """Seconds and peak megabytes of curvature and prediction, and the floor's peak, by name and unit."""
    work = Workload(shape, device)
    seconds, _ = batch_in_turn(work.collect, work.batch, {}, repeats, device)
    posterior = LaplacePosterior(work.collect([work.batch]))
    predict = partial(posterior.predict, work.model, work.class_logits(), work.batch)
    known = [
        *work.tensors(),
        *(tensor for layer in posterior.factors.layers for tensor in layer.tensors().values()),
    ]
    predictions = in_turn({"": predict}, repeats, device)[""]
    return {
        ("curvature", "s"): seconds,
        ("prediction", "s"): predictions,
        ("curvature", "MB"): (peak_megabytes(partial(work.collect, [work.batch]), device, known),),
        ("prediction", "MB"): (peak_megabytes(predict, device, known),),
        ("floor", "MB"): (peak_megabytes(work.floor, device, known),),
    }
