"""Predictions of the Laplace posterior, as they are or followed by a temperature."""

from __future__ import annotations

from torch import Tensor

from bmoe_lightning.laplace.posterior import LaplacePosterior
from bmoe_lightning.laplace.predictive import LINKS, NUM_SAMPLES, LinkName, class_probabilities
from bmoe_lightning.methods.method import BatchView, Method
from bmoe_lightning.methods.temperature import check_temperature


class LaplaceMethod(Method):
    """The predictive of a Laplace posterior over the experts.

    Posteriors that differ in their prior precision alone share the covariance terms of a batch: the `BatchView` must
    have been made with a posterior of the same factors.

    Args:
        posterior: with its prior precision fitted.
        name: identifier.
        label: what a person reads.
        link: `mc`, `isotropic`, `probit` or `laplace_bridge`.
        num_samples: Monte Carlo samples of the sampling links.
        seed: of their noise.

    Raises:
        ValueError: for an unknown link, or less than one sample.
    """

    needs_posterior = True

    def __init__(
        self,
        posterior: LaplacePosterior,
        name: str = "laplace",
        label: str = "Bayesian-MoE",
        link: LinkName = "mc",
        num_samples: int = NUM_SAMPLES,
        seed: int = 0,
    ) -> None:
        if link not in LINKS:
            raise ValueError(f"unknown link {link!r}; valid are {', '.join(LINKS)}")
        if num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, got {num_samples}")
        self.posterior = posterior
        self.name = name
        self.label = label
        self.link: LinkName = link
        self.num_samples = num_samples
        self.seed = seed

    def log_probs(self, view: BatchView) -> Tensor:
        """Log-probabilities of one batch: `[B, K]` float64, `-inf` for absent classes."""
        covariance = self.posterior.covariance_of(view.terms)
        return class_probabilities(
            view.terms.logits, covariance, self.link, num_samples=self.num_samples, seed=self.seed
        )

    def hyperparameters(self) -> dict[str, float]:
        """The prior precision: one number if all layers share it, else one a layer by the layer's index."""
        precision = self.posterior.prior_precision
        if bool((precision == precision[0]).all()):
            return {"prior_precision": float(precision[0])}
        layers = self.posterior.factors.layers
        return {f"prior_precision_{layer.index}": float(value) for layer, value in zip(layers, precision, strict=True)}


class LaplaceTemperature(LaplaceMethod):
    """The predictive of a Laplace posterior, its log-probabilities divided by a temperature and normalised again.

    Args:
        posterior: with its prior precision fitted.
        temperature: T, from `fit_temperature` on the log-probabilities of held-out data.
        name: identifier.
        label: what a person reads.
        link: `mc`, `isotropic`, `probit` or `laplace_bridge`.
        num_samples: Monte Carlo samples of the sampling links.
        seed: of their noise.

    Raises:
        ValueError: for an unknown link, less than one sample, or a temperature that is not positive and finite.
    """

    def __init__(
        self,
        posterior: LaplacePosterior,
        temperature: float,
        name: str = "laplace_temperature",
        label: str = "Bayesian-MoE + temperature",
        link: LinkName = "mc",
        num_samples: int = NUM_SAMPLES,
        seed: int = 0,
    ) -> None:
        super().__init__(posterior, name, label, link, num_samples, seed)
        self.temperature = check_temperature(temperature)

    def log_probs(self, view: BatchView) -> Tensor:
        """Log-probabilities of one batch: `[B, K]` float64, `-inf` for absent classes."""
        return (super().log_probs(view) / self.temperature).log_softmax(-1)

    def hyperparameters(self) -> dict[str, float]:
        """Prior precision and temperature."""
        return {**super().hyperparameters(), "temperature": self.temperature}
