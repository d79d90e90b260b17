"""A temperature from what the posterior says the model would have predicted for each training example without it.

The posterior knows how far each training example has moved its own logits (memory perturbation, Nickl et al. 2023), so
training labels estimate the accuracy on new inputs, and the confidence there is scaled to it. No held-out labels are
used. Serving takes one forward pass: once T is fitted, the posterior is no longer needed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from bmoe_lightning.curvature.gradient_share import GradientShare, GradientShareRecorder
from bmoe_lightning.curvature.spec import Curvature
from bmoe_lightning.laplace.predictive import MIN_UNLABELLED, mean_variance
from bmoe_lightning.laplace.prior import SCOPES, Scope
from bmoe_lightning.methods.base import CurvatureMethod, State, check_choice, scalar
from bmoe_lightning.methods.batch_view import BatchView
from bmoe_lightning.methods.needs import Needs
from bmoe_lightning.methods.options import option
from bmoe_lightning.methods.posterior_options import prior_mean_option, scope_option
from bmoe_lightning.methods.temperature_search import TEMPERATURE_RANGE
from bmoe_lightning.methods.workbench import PRIOR_MEANS, PriorMeanName, Workbench
from bmoe_lightning.utils.fit_warnings import warn_of_fit

_BISECTIONS = 60


@dataclass(frozen=True)
class LeaveOneOutTemperature(CurvatureMethod):
    """`softmax(f / T)` with the mean confidence on unlabelled inputs equal to a leave-one-out estimate of the accuracy.

    The estimate is the share of training labels that the model would predict if the example had been left out, to first
    order and under the posterior whose prior precision maximises the evidence, divided by `kappa` (the weights that
    were trained beside those of the posterior; see `GradientShare`). Memory perturbation: Nickl et al. 2023
    (https://arxiv.org/abs/2310.19273); the temperature is particular to this library. It was sometimes far off, and no
    better than the evidence temperature on real questions: an option, not a default.

    The fit takes a further pass over `train_inputs` training examples with K - 1 backward passes, K the number of
    classes: `train_inputs / N` of a curvature pass over N examples.

    Raises:
        ValueError: If the scope or prior mean is unknown, the Fisher is not `exact`, or a number of inputs is below 1.
    """

    name: str = "leave_one_out_temperature"
    label: str = "Leave-one-out temperature"
    scope: Scope = scope_option()
    prior_mean: PriorMeanName = prior_mean_option()
    train_inputs: int = option(
        512, "Number of training examples that the accuracy is estimated from, rounded up to whole batches.", trial=8
    )
    min_inputs: int = option(
        MIN_UNLABELLED, "Number of held-out inputs below which the fit is refused: their confidence is noisy.", trial=1
    )

    positive_state = ("temperature", "kappa")
    source = "https://arxiv.org/abs/2310.19273"

    def __post_init__(self) -> None:
        check_choice("scope", self.scope, SCOPES)
        check_choice("prior_mean", self.prior_mean, PRIOR_MEANS)
        for name, number in (("train_inputs", self.train_inputs), ("min_inputs", self.min_inputs)):
            if number < 1:
                raise ValueError(f"{self.name} needs {name} of at least 1, got {number}")
        if self.curvature is not None and not self.curvature.collects:
            raise ValueError(f"{self.name} needs a curvature of rank 1 or more, got rank 0, which takes no pass")
        if self.curvature is not None and self.curvature.fisher != "exact":
            raise ValueError(f"{self.name} needs a curvature with fisher='exact', got {self.curvature.fisher!r}")

    @property
    def needs(self) -> Needs:
        return Needs(
            calibration_inputs=self.min_inputs,
            training_labels=True,
            prior_mean=self.prior_mean == "pretrained",
            gradient_share=True,
        )

    @property
    def prediction_curvatures(self) -> tuple[Curvature, ...]:
        return ()

    @property
    def calibration_curvatures(self) -> tuple[Curvature, ...]:
        return ()

    def check_run(
        self,
        model: nn.Module,
        folder: Path | None,
        *,
        ranks_per_node: int = 1,
        trained: Sequence[nn.Parameter] | None = None,
    ) -> None:
        if trained is not None and not all(parameter.requires_grad for parameter in trained):
            return  # some are unfrozen later, so the share that the posterior covers is not known yet
        layers = self.spec.posterior_layers(model)
        shares = GradientShareRecorder(model, layers, trained=trained).finish()
        if (known := shares.known([layer.name for layer in layers])) is not None:
            known_kappa(self.name, known)

    def fit(self, work: Workbench) -> State:
        kappa = known_kappa(self.name, work.share(self.spec))
        precision = work.evidence_precision(self.spec, self.scope, self.prior_mean) / kappa
        cache = work.training_covariances(self.spec, self.train_inputs)
        logits, labels = cache.labelled()
        posterior = work.posterior(self.spec)
        gamma = effective_parameters(posterior.curvature, precision)
        # As many examples as the curvature stands for.
        gamma *= len(labels) / posterior.factors.num_examples
        accuracy = leave_one_out_accuracy(logits, labels, cache.covariance(precision), gamma)
        held_out, _ = work.calibration_logits()
        temperature = confidence_temperature(held_out, accuracy)
        return {"temperature": scalar(temperature), "accuracy": scalar(accuracy), "kappa": scalar(kappa)}

    def log_probs(self, batch: BatchView, state: State) -> Tensor:
        return (batch.logits / state["temperature"].to(batch.logits)).log_softmax(-1)

    def refit(self, state: State, logits: Tensor, labels: Tensor) -> State | None:
        return state  # held-out labels are not used


def known_kappa(name: str, share: GradientShare) -> float:
    """The inverse of the share of the trained weights' gradient that a posterior covers.

    Args:
        name: Name of the method, for messages.
        share: The share.

    Raises:
        ValueError: If it is unknown, or infinite.
    """
    if share.kappa is None:
        raise ValueError(
            f"{name} scales the posterior to all trained weights, and what it covers of their gradient is unknown: "
            f"{share.reason}; remove the method, or fit again with weights that require gradients"
        )
    if math.isinf(share.kappa):
        raise ValueError(
            f"{name} scales the posterior to all trained weights, and it covers none of them; choose a curvature over "
            "layers that were trained, or remove the method"
        )
    return share.kappa


def effective_parameters(curvature: Sequence[Tensor], precision: Tensor) -> float:
    """The number of directions that the data determine, `gamma = sum s / (lambda + s)`.

    Args:
        curvature: Eigenvalues `s_qp` of each layer, `[E, r_g, r_a]`.
        precision: Prior precision `[L]`.
    """
    return sum(float((s / (value + s)).sum()) for s, value in zip(curvature, precision.tolist(), strict=True))


def leave_one_out_logits(
    logits: Tensor, labels: Tensor, covariance: Tensor, *, scale: float = 1.0, temperature: float = 1.0
) -> Tensor:
    """The logits that a model would have for each training example without it, to first order in the covariance.

    Args:
        logits: Logits `[N, K]` float64, `-inf` for absent classes.
        labels: Labels `[N]`.
        covariance: Covariance `[N, K, K]` of the centred logits, zero for absent classes.
        scale: Factor on the covariance.
        temperature: Temperature of the residual.

    Returns:
        `f - scale Lambda (y - softmax(f / temperature))`, `[N, K]`.
    """
    targets = nn.functional.one_hot(labels, logits.shape[1]).to(logits)
    residuals = targets - (logits / temperature).softmax(-1)
    return logits - scale * (covariance @ residuals.unsqueeze(2)).squeeze(2)


def leave_one_out_accuracy(logits: Tensor, labels: Tensor, covariance: Tensor, gamma: float) -> float:
    """The share of training labels that the model would predict without the example.

    Args:
        logits: Logits `[N, K]` float64, `-inf` for absent classes.
        labels: Labels `[N]`.
        covariance: Covariance `[N, K, K]` of the centred logits.
        gamma: Number of directions that these N examples determine. The variance that they have at their own labels,
            `sum_n tr(S_n Lambda_n)` with `S = diag p - p p^T`, is exactly that for the posterior of the full
            Gauss-Newton matrix, and is scaled down to it otherwise.
    """
    probabilities = logits.softmax(-1)
    hessian = torch.diag_embed(probabilities) - probabilities.unsqueeze(2) * probabilities.unsqueeze(1)
    explained = float((hessian * covariance).sum())
    scale = min(1.0, gamma / explained) if explained > 0 else 1.0
    temperature = math.sqrt(1 + math.pi / 4 * float(mean_variance(logits, covariance).quantile(0.5)))
    without = leave_one_out_logits(logits, labels, covariance, scale=scale, temperature=temperature)
    return float((without.argmax(1) == labels).double().mean())


def mean_confidence(logits: Tensor, temperature: float) -> float:
    """The mean of the largest probability of `softmax(f / T)` over logits `[N, K]`."""
    return float((logits / temperature).softmax(-1).amax(1).mean())


def confidence_temperature(logits: Tensor, accuracy: float) -> float:
    """The temperature at which the mean confidence equals an accuracy.

    The confidence decreases in T, from 1 to the mean of 1 / K.

    Args:
        logits: Logits `[N, K]` float64, `-inf` for absent classes.
        accuracy: Estimated accuracy.

    Returns:
        T in `TEMPERATURE_RANGE`, by bisection in log T.

    Warns:
        FitWarning: If T is at an end of the range: the accuracy is that of chance or below, or 1.
    """
    low, high = TEMPERATURE_RANGE
    if mean_confidence(logits, high) >= accuracy:
        chance = float((1 / (logits > -torch.inf).sum(1)).double().mean())
        found = "no better than chance" if accuracy <= chance else "hardly better than chance"
        warn_of_fit(
            f"without each training example its label would be predicted with an accuracy of {accuracy:.3f}, which is "
            f"{found} ({chance:.3f}), so the temperature is at the end of its range ({high:g}): the model may not have "
            "learned the task; check its accuracy on labels",
            stacklevel=2,
        )
        return high
    if mean_confidence(logits, low) <= accuracy:
        warn_of_fit(
            f"without each training example its label would be predicted with an accuracy of {accuracy:.3f}, which no "
            f"temperature reaches, so it is at the end of its range ({low:g}); use a temperature fitted on labels",
            stacklevel=2,
        )
        return low
    bottom, top = math.log(low), math.log(high)
    for _ in range(_BISECTIONS):
        middle = (bottom + top) / 2
        bottom, top = (middle, top) if mean_confidence(logits, math.exp(middle)) > accuracy else (bottom, middle)
    return math.exp((bottom + top) / 2)
