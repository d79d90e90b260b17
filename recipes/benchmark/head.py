"""The cost of the output embedding: contiguous states against the slice that a number of positions makes of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bmoe_lightning.experts import expert_parameters
from bmoe_lightning.models.last_logits import last_logits
from recipes.benchmark.measure import Amount, Ratio, Section
from recipes.benchmark.workload import Shape, Workload
from recipes.common.timing import in_turn

_DTYPES = ("float32", "bfloat16")
_BAR = 1.0

LastLogits = Callable[[], Tensor]


def measure_head(shape: Shape, repeats: int, device: torch.device, say: Callable[[str], None]) -> Section:
    """Time forward passes and training steps of the experts with both inputs of a frozen output embedding."""
    ratios: list[Ratio] = []
    amounts: list[Amount] = []
    differences: list[float] = []
    for dtype in _DTYPES:
        say(f"head: {dtype}")
        work = Workload(replace(shape, dtype=dtype), device)
        ways: dict[str, LastLogits] = {"slice": partial(_of_a_slice, work), "contiguous": partial(_contiguous, work)}
        with torch.no_grad():
            slices, contiguous = (logits().float() for logits in ways.values())
        differences.append(float((slices - contiguous).abs().max() / slices.abs().max()))
        for name, action in (("forward", _forward), ("training step", partial(_train, work))):
            times = in_turn({way: partial(action, logits) for way, logits in ways.items()}, repeats, device)
            ratios.append(
                Ratio(f"{name}: contiguous / slice, {dtype}", times["contiguous"], times["slice"], _BAR),
            )
            amounts += [Amount(f"{name}, {way}, {dtype}", "s", values) for way, values in times.items()]
    largest = " and ".join(f"{value:.0e} in {dtype}" for dtype, value in zip(_DTYPES, differences, strict=True))
    return Section(
        "head",
        "Output embedding: contiguous states / a slice of them",
        (
            f"Model: {shape.vocabulary} tokens of vocabulary; {replace(shape, dtype='both dtypes')}.",
            "`logits_to_keep=1` gives the output embedding a slice `[B, 1, d]` that is not contiguous, for which torch "
            "runs one product for each row and copies a frozen weight for each. `last_logits` asks for positions, "
            f"which are gathered. Largest difference of the logits, relative to the largest logit: {largest}.",
        ),
        ratios=tuple(ratios),
        amounts=tuple(amounts),
    )


def _of_a_slice(work: Workload) -> Tensor:
    """Logits `[B, V]` at the last position, as `logits_to_keep=1` computes them."""
    return work.model(input_ids=work.batch["ids"], use_cache=False, logits_to_keep=1).logits[:, -1]


def _contiguous(work: Workload) -> Tensor:
    """Logits `[B, V]` at the last position, as `ExpertFinetuner` computes them."""
    ids = work.batch["ids"]
    model: Any = work.model
    return last_logits(model, ids, torch.ones_like(ids))


def _forward(logits: LastLogits) -> None:
    with torch.no_grad():
        logits()


def _train(work: Workload, logits: LastLogits) -> None:
    """Forward and backward pass of a training step of the experts, without the optimiser's step."""
    trained = [weight for layer in work.layers for weight in expert_parameters(work.model, layer).values()]
    for parameter in trained:
        parameter.requires_grad_(True)
    nn.functional.cross_entropy(logits().float(), work.batch["labels"]).backward()
    for parameter in trained:
        parameter.grad = None
        parameter.requires_grad_(False)
