"""NLL against the number of labels that a temperature is fitted on."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from bmoe_lightning.methods import fit_shrunk_temperature, fit_temperature
from bmoe_lightning.metrics import negative_log_likelihood
from bmoe_lightning.report import LabelBudgetPoint, MethodResult

BUDGETS = (0, 10, 25, 50, 100)
_DRAWS = 50


def label_budget(results: Sequence[MethodResult], calibration: Sequence[MethodResult]) -> list[LabelBudgetPoint]:
    """Test NLL of the three temperatures when fewer calibration labels are known.

    Temperature scaling without labels is the model itself; the evidence temperature needs none and stays the same. For
    each budget the labels are drawn 50 times a seed; the band is the range that holds 80 % of these draws.

    Args:
        results: of the test split, with `map`, `temperature`, `evidence_temperature` and `shrunk_temperature`.
        calibration: `map` on the calibration split, for the same seeds.

    Returns:
        One point for each method and budget (None is all labels); empty if a method is missing.
    """
    by_name = {name: [r for r in results if r.method == name] for name in {r.method for r in results}}
    if not {"map", "temperature", "evidence_temperature", "shrunk_temperature"} <= set(by_name):
        return []
    calibration_maps = {r.seed: r for r in calibration if r.method == "map"}
    losses: dict[tuple[str, int | None], list[float]] = {}
    for plain, evidence in zip(by_name["map"], by_name["evidence_temperature"], strict=True):
        known = calibration_maps[plain.seed]
        temperature = evidence.extra["temperature"]
        for budget in (*BUDGETS, None):
            if budget is not None and budget > len(known.target):
                continue
            for chosen in _draws(len(known.target), budget, plain.seed):
                fitted, shrunk = _temperatures(known.log_probs[chosen], known.target[chosen], temperature)
                losses.setdefault(("temperature", budget), []).append(_nll(plain, fitted))
                losses.setdefault(("evidence_temperature", budget), []).append(_nll(plain, temperature))
                losses.setdefault(("shrunk_temperature", budget), []).append(_nll(plain, shrunk))
    labels_of = {name: group[0].label for name, group in by_name.items()}
    return [_point(name, labels_of[name], budget, values) for (name, budget), values in losses.items()]


def _temperatures(logits: Tensor, labels: Tensor, evidence_temperature: float) -> tuple[float, float]:
    """Fitted and shrunk temperature from few labels, or from none."""
    if not len(labels):
        return 1.0, evidence_temperature
    with warnings.catch_warnings():
        # Ten labels, all answered right, do not determine a temperature; that is what this study shows.
        warnings.filterwarnings("ignore", message="the fitted temperature")
        fitted = fit_temperature(logits, labels)
    return fitted, fit_shrunk_temperature(logits, labels, evidence_temperature)


def _draws(size: int, budget: int | None, seed: int) -> list[Tensor]:
    """Which calibration items have labels, draw by draw; one draw where there is nothing to choose."""
    if not budget:
        return [torch.arange(size if budget is None else 0)]
    generator = torch.Generator().manual_seed(1000 * seed + budget)
    return [torch.randperm(size, generator=generator)[:budget] for _ in range(_DRAWS)]


def _nll(plain: MethodResult, temperature: float) -> float:
    return float(negative_log_likelihood((plain.log_probs / temperature).log_softmax(-1), plain.target))


def _point(method: str, label: str, budget: int | None, values: list[float]) -> LabelBudgetPoint:
    low, median, high = torch.tensor(values).quantile(torch.tensor([0.1, 0.5, 0.9])).tolist()
    return LabelBudgetPoint(method, label, budget, median, low, high)
