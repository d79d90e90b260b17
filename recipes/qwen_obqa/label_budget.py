"""NLL against the number of labels, for every method that is fitted on labelled logits alone."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from bmoe_lightning.methods import BatchView, FitResult, Method
from bmoe_lightning.metrics import negative_log_likelihood
from bmoe_lightning.report import LabelBudgetPoint, MethodResult

BUDGETS = (0, 10, 25, 50, 100)
DRAWS, DRY_RUN_DRAWS = 50, 2


def label_budget(
    methods: Sequence[Method],
    fits: Mapping[int, FitResult],
    logits: Mapping[int, Tensor],
    results: Sequence[MethodResult],
    *,
    draws: int = DRAWS,
) -> list[LabelBudgetPoint]:
    """Test NLL against the number of calibration labels, for all methods that can be refitted to other labels.

    For each budget the labels are drawn several times a seed; the band spans the 10 % and 90 % quantiles of the draws.

    Args:
        methods: Methods of the run; those whose `refit` returns None are left out.
        fits: Fit of each seed, with the logits and labels of the calibration split.
        logits: Logits of the model itself on the test split by seed, `[N, K]` float64.
        results: Results on the test split, for its labels.
        draws: Number of draws for each seed.

    Returns:
        One point for each method and budget (None is all labels); empty if no method can be refitted, or no fit has the
        calibration split's logits.
    """
    targets = {result.seed: result.target for result in results}
    # The state of another method may be as large as the model, and is checked whenever it is read.
    methods = [method for method in methods if type(method).refit is not Method.refit]
    losses: dict[tuple[str, int | None], list[float]] = {}
    for seed, fit in fits.items():
        known, labels = (None, None) if fit.calibration is None else fit.calibration
        if known is None or labels is None:
            continue
        for budget in (*BUDGETS, None):
            if budget is not None and budget > len(labels):
                continue
            for chosen in _drawn(len(labels), budget, seed, draws):
                for method in methods:
                    loss = _loss(method, fit, (known[chosen], labels[chosen]), logits[seed], targets[seed])
                    if loss is not None:
                        losses.setdefault((method.name, budget), []).append(loss)
    label_of = {method.name: method.label for method in methods}
    order = {method.name: position for position, method in enumerate(methods)}
    points = [_point(name, label_of[name], budget, values) for (name, budget), values in losses.items()]
    return sorted(points, key=lambda point: order[point.method])


def _loss(
    method: Method, fit: FitResult, labelled: tuple[Tensor, Tensor], logits: Tensor, target: Tensor
) -> float | None:
    """Test NLL of a method that is refitted to these labels, or None if it cannot be."""
    with warnings.catch_warnings():
        # Ten correct predictions do not determine a temperature, and showing that is the purpose here.
        warnings.filterwarnings("ignore", message="the fitted temperature")
        state = method.refit(fit.state_of(method), *labelled)
    if state is None:
        return None
    log_probs = method.log_probs(BatchView.of_logits(logits), state)
    return float(negative_log_likelihood(log_probs, target))


def _drawn(size: int, budget: int | None, seed: int, draws: int) -> list[Tensor]:
    """Indices of the labelled calibration items, one tensor for each draw; a single draw for no or all labels."""
    if not budget:
        return [torch.arange(size if budget is None else 0)]
    generator = torch.Generator().manual_seed(1000 * seed + budget)
    return [torch.randperm(size, generator=generator)[:budget] for _ in range(draws)]


def _point(method: str, label: str, budget: int | None, values: list[float]) -> LabelBudgetPoint:
    low, median, high = torch.tensor(values).quantile(torch.tensor([0.1, 0.5, 0.9])).tolist()
    return LabelBudgetPoint(method, label, budget, median, low, high)
