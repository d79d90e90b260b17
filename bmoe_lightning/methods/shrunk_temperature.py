"""A temperature fitted on a few labels under a prior on its inverse."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from bmoe_lightning.methods.base import Method, State, scalar
from bmoe_lightning.methods.batch_view import BatchView
from bmoe_lightning.methods.needs import Needs
from bmoe_lightning.methods.options import option
from bmoe_lightning.methods.temperature_search import (
    TEMPERATURE_RANGE,
    check_labelled,
    is_at_end,
    is_independent_of_temperature,
    minimise,
    negative_log_likelihood,
)
from bmoe_lightning.methods.workbench import Workbench
from bmoe_lightning.utils.fit_warnings import warn_of_fit

CENTRE = 0.4
WIDTH = 0.2


@dataclass(frozen=True)
class ShrunkTemperature(Method):
    """`softmax(f / T)` with T fitted on held-out labels under a Gaussian prior on 1/T.

    Without labels T is `1 / centre`, with many it is that of temperature scaling. The loss is convex in 1/T and nearly
    quadratic there, so a Gaussian on 1/T yields to labels that speak for a very large T (a model that is no better than
    chance), which one on log T does not. This is the method of Guo et al. 2017 (https://arxiv.org/abs/1706.04599) with
    a penalty; the prior is particular to this library.

    Raises:
        ValueError: If the centre or the width is not positive and finite.
    """

    name: str = "shrunk_temperature"
    label: str = "Shrunk temperature"
    centre: float = option(CENTRE, "Mean of the prior on 1/T.")
    width: float = option(WIDTH, "Standard deviation of the prior on 1/T.")

    positive_state = ("temperature",)
    source = "https://arxiv.org/abs/1706.04599"

    def __post_init__(self) -> None:
        _check_prior(self.centre, self.width)

    @property
    def needs(self) -> Needs:
        return Needs(calibration_labels=True, advised_labels=10)

    def fit(self, work: Workbench) -> State:
        return self._fitted(*work.labelled_logits())

    def log_probs(self, batch: BatchView, state: State) -> Tensor:
        return (batch.logits / state["temperature"].to(batch.logits)).log_softmax(-1)

    def refit(self, state: State, logits: Tensor, labels: Tensor) -> State:
        return self._fitted(logits, labels)

    def _fitted(self, logits: Tensor, labels: Tensor) -> State:
        temperature = fit_shrunk_temperature(logits, labels, centre=self.centre, width=self.width)
        return {"temperature": scalar(temperature)}


def fit_shrunk_temperature(logits: Tensor, labels: Tensor, *, centre: float = CENTRE, width: float = WIDTH) -> float:
    """Minimise `sum_n NLL(softmax(f_n / T)) + (1/T - centre)^2 / (2 width^2)` over T.

    Without labels this is `1 / centre`, with many it is temperature scaling. Both terms are convex in 1/T.

    Args:
        logits: Logits `[N, K]`, `-inf` for absent classes; N may be 0.
        labels: Labels `[N]` int64.
        centre: Mean of the prior on 1/T.
        width: Standard deviation of the prior on 1/T.

    Returns:
        T; `1 / centre` if the likelihood does not depend on it.

    Raises:
        ValueError: If the centre or the width is not positive and finite, or logits and labels are invalid; see
            `fit_temperature`.

    Warns:
        FitWarning: If T is at an end of the search range, or the likelihood does not depend on it.
    """
    _check_prior(centre, width)
    logits, labels = check_labelled(logits, labels)
    if len(labels) == 0:
        return 1 / centre
    if is_independent_of_temperature(logits, labels):
        warn_of_fit(
            f"the likelihood of the {len(labels)} labels does not depend on the temperature (every example's logits "
            f"are constant), so it is that of the prior, {1 / centre:.3g}; check the model",
            stacklevel=2,
        )
        return 1 / centre

    def objective(log_temperature: Tensor) -> Tensor:
        penalty = ((-log_temperature).exp() - centre).square() / (2 * width**2)
        return negative_log_likelihood(logits, labels, log_temperature) + penalty

    low, high = (math.log(value) for value in TEMPERATURE_RANGE)
    log_range = min(low, -math.log(centre)), max(high, -math.log(centre))
    log_temperature = minimise(objective, *log_range)
    if is_at_end(log_temperature, *log_range):
        warn_of_fit(
            f"the fitted temperature {math.exp(log_temperature):.3g} is at the end of the search range, although the "
            f"prior is against it: the predictions of the {len(labels)} labelled examples are no better than chance, "
            "or all correct under a wide prior; train longer, or check the labels",
            stacklevel=2,
        )
    return math.exp(log_temperature)


def _check_prior(centre: float, width: float) -> None:
    for name, value in (("centre", centre), ("width", width)):
        if not 0 < value < math.inf:
            raise ValueError(f"{name} of the prior on 1/T must be positive and finite, got {value}")
