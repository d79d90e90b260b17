"""The cost of the curvature pass relative to a plain training pass over the same batch."""

from __future__ import annotations

import itertools
from functools import partial

from bmoe_lightning.curvature.fisher import FisherName
from bmoe_lightning.curvature.sketch import EXACT_WIDTH, NystromGram, SketchName
from recipes.benchmark.measure import Amount, Ratio, Section, batch_in_turn, time_inside
from recipes.benchmark.workload import Workload

SKETCH_BAR = 0.05
_VARIANTS: tuple[tuple[FisherName, SketchName], ...] = (
    ("mc", "auto"),
    ("empirical", "auto"),
    ("exact", "auto"),
    ("mc", "nystrom"),
    ("mc", "rsvd"),
    ("mc", "exact"),
)
_TRAININGS = {"experts": "training all expert matrices", "down_proj": "training down_proj only"}


def measure_curvature(work: Workload, repeats: int) -> Section:
    """Time one more batch of each curvature pass, alternating with training steps on that batch."""
    ratios: list[Ratio] = []
    amounts: list[Amount] = []
    trainings = {part: partial(work.train, part) for part in _TRAININGS}
    for fisher, sketch in _VARIANTS:
        if sketch != "auto" and sketch == resolved(work):
            continue  # timed already, as `auto`
        own, others = batch_in_turn(
            partial(work.collect, fisher=fisher, sketch=sketch), work.batch, trainings, repeats, work.device
        )
        label = f"{fisher}, {sketch}" if sketch != "auto" else f"{fisher}, auto ({resolved(work)})"
        bar = 0.6 * work.shape.classes if fisher == "exact" else 1.0
        for part, name in _TRAININGS.items():
            # The bound is relative to training all expert matrices, also for users who train down_proj alone.
            ratios.append(Ratio(f"curvature ({label}) / {name}", own, others[part], bar if part == "experts" else None))
        amounts.append(Amount(f"a curvature batch ({label})", "s", own))
        if (fisher, sketch) == _VARIANTS[0]:
            amounts += [Amount(f"a batch of {name}", "s", others[part]) for part, name in _TRAININGS.items()]
    ratios.append(sketch_share(work, repeats))
    return Section(
        "curvature",
        "Curvature pass / training pass",
        (
            "Marginal cost of a batch: the pass is timed from one batch to the next, without set-up, first batch and "
            "the decomposition at its end. A training pass is forward and backward with weight gradients, without the "
            "optimiser's step.",
        ),
        ratios=tuple(ratios),
        amounts=tuple(amounts),
    )


def resolved(work: Workload) -> str:
    """The sketch that `auto` resolves to for the model's layers."""
    kinds = {"exact" if width <= EXACT_WIDTH else "nystrom" for x in work.layers for width in (x.d_in, x.d_out)}
    return " and ".join(sorted(kinds))


def sketch_share(work: Workload, repeats: int) -> Ratio:
    """Share of a batch's time that is spent in updates of the Nystrom sketch, measured in separate passes."""
    inside: list[float] = []
    with time_inside(NystromGram, "update", work.device) as spent:

        def note() -> None:
            inside.append(sum(spent))

        own, _ = batch_in_turn(partial(work.collect, sketch="nystrom"), work.batch, {"": note}, repeats, work.device)
        note()
    # The first value was noted before the pass; consecutive others are one batch apart.
    shares = tuple(after - before for before, after in itertools.pairwise(inside[1:]))
    widths = sorted({width for layer in work.layers for width in (layer.d_in, layer.d_out)})
    name = f"updates of Nystrom sketches (d = {', '.join(map(str, widths))}) / curvature batch (mc, nystrom)"
    return Ratio(name, shares, own, SKETCH_BAR)
