"""Links from a Gaussian over logits to class probabilities.

Every link takes `logits [B, K]` (`-inf` for absent classes) and their `covariance [B, K, K]` (zero rows and columns for
absent classes), and returns log-probabilities `[B, K]`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from bmoe_lightning.laplace.present import of_classes, present_first
from bmoe_lightning.utils.fit_warnings import warn_of_fit

LinkName = Literal["mc", "isotropic", "probit", "laplace_bridge"]

NUM_SAMPLES = 10_000
"""Default number of Monte Carlo samples: standard error .004 of a probability at logits of standard deviation 3."""


MIN_UNLABELLED = 100
"""Minimum number of inputs for the evidence temperature."""

_UNIFORM_TEMPERATURE = 100.0
# Monte Carlo samples held at a time: bounds memory for any number of examples and classes.
_CHUNK_FLOATS = 1 << 24
_CACHED_FLOATS = 1 << 18  # the same on a CPU, whose caches hold as many
_SMALLEST_MEAN = 1e-30  # of float32 and float64
_NUM_NOISES, _NOISE_FLOATS = 4, 1 << 20


@dataclass(frozen=True)
class Prediction:
    """A prediction with its uncertainty.

    Attributes:
        log_probs: Log-probabilities `[B, K]`, natural logarithm.
        logits: Logits `[B, K]` of the model (MAP).
        covariance: Covariance `[B, K, K]` of the centred logits.
        entropy: Entropy `[B]` of the averaged probabilities in nats.
        mutual_information: Mutual information `[B]` between label and weights in nats: the epistemic part of the
            entropy.
    """

    log_probs: Tensor
    logits: Tensor
    covariance: Tensor
    entropy: Tensor
    mutual_information: Tensor


def class_probabilities(
    logits: Tensor, covariance: Tensor, link: LinkName = "mc", *, num_samples: int = NUM_SAMPLES, seed: int = 0
) -> Tensor:
    """Apply a link by name.

    Args:
        logits: Logits `[B, K]`.
        covariance: Covariance `[B, K, K]`.
        link: Link: `mc` (the paper's), `isotropic`, `probit` or `laplace_bridge`.
        num_samples: Number of Monte Carlo samples of `mc` and `isotropic`.
        seed: Seed for the noise, which is shared by all examples; classes have the same whatever columns an example
            lacks.

    Returns:
        Log-probabilities `[B, K]`.

    Raises:
        ValueError: If the link is unknown, there is less than one sample, or the covariance is not finite or not
            positive semi-definite, or a logit is NaN or +inf.
    """
    check_link(link, num_samples)
    _check_finite(logits, covariance)
    return LINKS[link](logits, covariance, num_samples, seed)


def check_link(link: str, num_samples: int) -> None:
    """Check a link and its number of samples.

    Raises:
        ValueError: If the link is unknown or there is less than one sample.
    """
    if link not in LINKS:
        raise ValueError(f"unknown link {link!r}; valid are {', '.join(LINKS)}")
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, got {num_samples}")


def _check_finite(logits: Tensor, covariance: Tensor) -> None:
    broken = torch.isnan(logits) | (logits == torch.inf)
    if bool(broken.any() | ~torch.isfinite(covariance).all()):
        raise ValueError(
            "the logits or their covariance are not finite (NaN or infinity): a gradient or a weight overflowed; check "
            "the weights and the scale of the logits, and use bfloat16 or float32 rather than float16"
        )


def monte_carlo(logits: Tensor, covariance: Tensor, num_samples: int = NUM_SAMPLES, seed: int = 0) -> Tensor:
    """Average of the softmax over samples of the logits, `[B, K]`: MC-Laplace of https://arxiv.org/abs/2511.08968."""
    classes = present_first(logits)
    chunks = _sample_chunks(logits, covariance, classes, num_samples, seed)
    return _in_columns(torch.cat([_log_mean_softmax(samples) for samples in chunks]), classes, logits.shape[1])


def isotropic(logits: Tensor, covariance: Tensor, num_samples: int = NUM_SAMPLES, seed: int = 0) -> Tensor:
    """`monte_carlo` with covariance `v I`, v the mean variance: an ablation of the shape of the covariance."""
    present = logits != -torch.inf
    variance = mean_variance(logits, covariance)
    return monte_carlo(logits, torch.diag_embed(variance.unsqueeze(1) * present), num_samples, seed)


def probit(logits: Tensor, covariance: Tensor, num_samples: int = 0, seed: int = 0) -> Tensor:  # noqa: ARG001
    """`softmax(f / sqrt(1 + pi/4 v))` with the mean variance v: one temperature per example.

    The probit approximation of MacKay 1992 (https://doi.org/10.1162/neco.1992.4.5.720); pi/4 v is pi/8 times
    the variance 2 v of a logit difference under the covariance `v I`.
    """
    scale = torch.sqrt(1 + math.pi / 4 * mean_variance(logits, covariance)).unsqueeze(1)
    return (logits / scale).log_softmax(-1)


def laplace_bridge(logits: Tensor, covariance: Tensor, num_samples: int = 0, seed: int = 0) -> Tensor:  # noqa: ARG001
    """The mean of the Dirichlet whose softmax-basis Laplace approximation is this Gaussian.

    Hobbhahn, Kristiadi and Hennig 2022, Fast Predictive Uncertainty for Classification with Bayesian Deep Networks, eq.
    7, on the centred logits (https://arxiv.org/abs/2003.01227).
    """
    present = logits != -torch.inf
    count = present.sum(1, keepdim=True).double()
    variances = centred(covariance, present).diagonal(dim1=1, dim2=2).clamp(min=torch.finfo(torch.float32).tiny)
    # alpha_k v_k = 1 - 2 / K + exp(f_k) sum_l exp(-f_l) / K^2, in logarithms, since the exponentials overflow. A shift
    # of all logits cancels.
    inverse = torch.where(present, -logits, -torch.inf).logsumexp(1, keepdim=True)
    growth = torch.where(present, logits + inverse, -torch.inf) - 2 * count.log()
    log_alpha = torch.logaddexp((1 - 2 / count).clamp(min=0).log(), growth) - variances.log()
    return torch.where(present, log_alpha, -torch.inf).log_softmax(-1)


LINKS: dict[str, Callable[[Tensor, Tensor, int, int], Tensor]] = {
    "mc": monte_carlo,
    "isotropic": isotropic,
    "probit": probit,
    "laplace_bridge": laplace_bridge,
}


def mean_variance(logits: Tensor, covariance: Tensor) -> Tensor:
    """`v = tr(C Lambda C) / (K - 1)` with the centring matrix C over the present classes: `[B]`."""
    present = logits != -torch.inf
    trace = centred(covariance, present).diagonal(dim1=1, dim2=2).sum(1)
    return trace / (present.sum(1) - 1).clamp(min=1)


def temperature_from_variances(variances: Tensor, *, min_inputs: int = MIN_UNLABELLED) -> float:
    """The evidence temperature `sqrt(1 + pi/4 median_n v_n)` from the mean variances of unlabelled inputs.

    The median is robust to a few inputs with very large logit variances.

    Args:
        variances: `[N]`, one for each input.
        min_inputs: Smallest N that is accepted.

    Raises:
        ValueError: If there are fewer inputs, or a variance is negative or not finite.

    Warns:
        FitWarning: If the temperature is above 100, so that all predictions are nearly uniform.
    """
    if len(variances) < min_inputs:
        raise ValueError(
            f"the evidence temperature needs at least {min_inputs} unlabelled inputs, got {len(variances)}"
        )
    if not bool((variances.isfinite() & (variances >= 0)).all()):
        raise ValueError(
            "the logit variances contain negative values, NaN or infinity, so they have no evidence temperature; check "
            "the model's weights and the prior precision"
        )
    temperature = math.sqrt(1 + math.pi / 4 * float(variances.double().quantile(0.5)))
    if temperature > _UNIFORM_TEMPERATURE:
        warn_of_fit(
            f"the evidence temperature {temperature:.3g} makes every prediction nearly uniform: the logit variances "
            "are too large to mean anything; check the prior mean and the scale of the logits, or fit on labels",
            stacklevel=2,
        )
    return temperature


def centred(covariance: Tensor, present: Tensor) -> Tensor:
    """`C Lambda C`, `C = I - 1 1^T / K` over the present classes: the covariance of the centred logits, `[B, K, K]`."""
    mask = present.to(covariance)
    centring = torch.diag_embed(mask) - mask.unsqueeze(2) * mask.unsqueeze(1) / mask.sum(1).view(-1, 1, 1)
    return centring @ covariance @ centring


def predict_with_uncertainty(
    logits: Tensor, covariance: Tensor, *, num_samples: int = NUM_SAMPLES, seed: int = 0
) -> Prediction:
    """The `mc` link, with entropy and mutual information from the same samples.

    Args:
        logits: Logits `[B, K]`.
        covariance: Covariance `[B, K, K]`.
        num_samples: Number of Monte Carlo samples.
        seed: Seed for the noise.
    """
    _check_finite(logits, covariance)
    classes = present_first(logits)
    parts = [
        (_log_mean_softmax(samples), entropy(samples.log_softmax(1).mT).mean(dim=1))
        for samples in _sample_chunks(logits, covariance, classes, num_samples, seed)
    ]
    log_probs, expected = (torch.cat(part) for part in zip(*parts, strict=True))
    log_probs = _in_columns(log_probs, classes, logits.shape[1])
    total = entropy(log_probs)
    return Prediction(log_probs, logits, covariance, total, (total - expected).clamp(min=0))


def square_root(covariance: Tensor) -> Tensor:
    """The symmetric square root `L [B, K, K]` of the covariance `L L`, from an eigendecomposition clipped at zero.

    It is unique: other signs or another order of the eigenvectors, or classes without variance, do not change it.

    Raises:
        ValueError: If an eigenvalue is negative beyond rounding.
    """
    values, vectors = torch.linalg.eigh(covariance)
    if bool((values[:, 0] < -1e-3 * values[:, -1].abs() - 1e-12).any()):
        raise ValueError(f"the covariance is not positive semi-definite: eigenvalue {values.min().item():.3g}")
    return (vectors * values.clamp(min=0).sqrt().unsqueeze(1)) @ vectors.mT


def _sample_chunks(
    logits: Tensor, covariance: Tensor, classes: Tensor, num_samples: int, seed: int
) -> Iterator[Tensor]:
    """`[b, C, S]` sampled logits of the classes of `present_first`, some examples at a time; at least once.

    Samples are the last axis: along a short one torch's softmax is several times slower.
    """
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, got {num_samples}")
    dtype = torch.promote_types(logits.dtype, covariance.dtype)
    logits, covariance = of_classes(logits, classes), of_classes(of_classes(covariance, classes).mT, classes)
    noise = _noise(num_samples, classes.shape[1], seed, dtype, covariance.device)
    at_a_time = _CACHED_FLOATS if covariance.device.type == "cpu" else _CHUNK_FLOATS
    size = max(1, at_a_time // noise.numel())
    means, roots = logits.to(dtype).unsqueeze(2), square_root(covariance).to(dtype)
    for mean, root in zip(means.split(size), roots.split(size), strict=True):
        yield torch.baddbmm(mean, root, noise.expand(len(root), -1, -1))


def _in_columns(log_probs: Tensor, classes: Tensor, num_classes: int) -> Tensor:
    """Log-probabilities `[B, C]` of the classes of `present_first` in their columns: `[B, K]`."""
    return log_probs.new_full((len(log_probs), num_classes), -torch.inf).scatter(1, classes, log_probs)


def _log_mean_softmax(samples: Tensor) -> Tensor:
    """The logarithm of the mean softmax of sampled logits `[b, K, S]`: `[b, K]`."""
    exponentials = (samples - samples.amax(1, keepdim=True)).exp_()
    # The product sums over the samples without storing the quotients.
    mean = (exponentials @ exponentials.sum(1).reciprocal().unsqueeze(2)).squeeze(2) / samples.shape[2]
    if bool(((mean < _SMALLEST_MEAN) & (samples[:, :, 0] != -torch.inf)).any()):  # may have underflowed
        return torch.logsumexp(samples.log_softmax(1), dim=2) - math.log(samples.shape[2])
    return mean.log()


_noise_cache: dict[tuple[Any, ...], Tensor] = {}


def _noise(num_samples: int, num_columns: int, seed: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The noise of `standard_normal`, transposed to `[C, S]`, on a device; that of the last few calls is stored."""
    key = (num_samples, num_columns, seed, dtype, device)
    noise = _noise_cache.get(key)
    if noise is None:
        with torch.inference_mode(False):
            noise = standard_normal(num_samples, num_columns, seed).T.contiguous().to(device, dtype)
        if noise.numel() <= _NOISE_FLOATS:
            if len(_noise_cache) >= _NUM_NOISES:
                _noise_cache.clear()
            _noise_cache[key] = noise
    return noise


def standard_normal(num_samples: int, num_columns: int, seed: int) -> Tensor:
    """Standard normal noise `[S, C]` float64, sampled on the CPU so that it is the same on every device.

    A column does not depend on how many follow it.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(num_samples, generator=generator, dtype=torch.float64) for _ in range(num_columns)]
    return torch.stack(drawn, dim=1)


def entropy(log_probs: Tensor) -> Tensor:
    """Entropy in nats of log-probabilities `[..., K]`: `[...]`."""
    return -(log_probs.exp() * torch.where(log_probs == -torch.inf, 0, log_probs)).sum(-1)
