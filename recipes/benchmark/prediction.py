"""The cost of the linearised prediction relative to its floor, and of the prior's fit on a validation set."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch

from bmoe_lightning import LaplacePosterior
from bmoe_lightning.laplace.covariance_cache import CovarianceCache
from bmoe_lightning.laplace.predictive import NUM_SAMPLES, class_probabilities
from bmoe_lightning.laplace.prior import fit_lpo
from recipes.benchmark.measure import Amount, Ratio, Section
from recipes.benchmark.workload import Workload
from recipes.common.timing import in_turn, seconds

VALIDATION_EXAMPLES = 500
_LPO_BAR = 1.05
_LPO_SECONDS_BAR = 2.0


def measure_prediction(
    work: Workload, posterior: LaplacePosterior, class_counts: tuple[int, ...], bar: float, repeats: int
) -> Section:
    """Time interleaved predictions, floors and plain forwards, for several K."""
    ratios: list[Ratio] = []
    amounts: list[Amount] = []
    for classes in class_counts:
        class_logits = work.class_logits(classes)
        logits, covariance = posterior.logit_covariance(work.model, class_logits, work.batch, centred=True)
        times = in_turn(
            {
                "prediction": partial(posterior.predict, work.model, class_logits, work.batch),
                "floor": partial(work.floor, classes),
                "forward": partial(work.forward, classes),
                "sampling": partial(class_probabilities, logits, covariance),
            },
            repeats,
            work.device,
        )
        prediction = times["prediction"]
        ratios += [
            Ratio(f"prediction / floor, K = {classes}", prediction, times["floor"], bar),
            Ratio(f"prediction / plain forward, K = {classes}", prediction, times["forward"]),
            Ratio(f"Monte Carlo sampling / prediction, K = {classes}", times["sampling"], prediction),
        ]
        amounts += [Amount(f"{name}, K = {classes}", "s", values) for name, values in times.items()]
    return Section(
        "prediction",
        "Linearised prediction / its floor",
        (
            "The floor is one forward with graph and K - 1 gradients of the logits with respect to the experts' "
            f"outputs. A prediction has {NUM_SAMPLES} samples; a posterior's first one, which checks the model, is not "
            "counted.",
        ),
        ratios=tuple(ratios),
        amounts=tuple(amounts),
    )


def measure_lpo(work: Workload, posterior: LaplacePosterior, repeats: int) -> Section:
    """Time LPO's pass over a set interleaved with predictions of that set, then its optimisation."""
    class_logits = work.class_logits()

    def cache() -> CovarianceCache:
        return posterior.validation_cache(work.model, class_logits, [work.batch])

    predict = partial(posterior.predict, work.model, class_logits, work.batch)
    times = in_turn({"LPO's pass": cache, "prediction": predict}, repeats, work.device)
    validation = repeated(cache(), VALIDATION_EXAMPLES)
    fits = tuple(seconds(partial(fit_lpo, validation), work.device) for _ in range(repeats))
    scale = VALIDATION_EXAMPLES / work.shape.examples
    whole = tuple(scale * once + fit for once, fit in zip(times["LPO's pass"], fits, strict=True))
    predicted = tuple(scale * value for value in times["prediction"])
    size = f"{VALIDATION_EXAMPLES} examples"
    return Section(
        "lpo",
        "Laplace prior optimisation / one predictive pass",
        (
            f"The passes are over one batch; with the fit, both are scaled to {size}. The optimisation is "
            f"timed on {size}: the same batches with the logits and labels of an overconfident model.",
        ),
        ratios=(
            Ratio("LPO's pass / one predictive pass", times["LPO's pass"], times["prediction"], _LPO_BAR),
            Ratio(f"LPO with its optimisation / one predictive pass, {size}", whole, predicted),
        ),
        amounts=(
            Amount(f"optimisation, a precision a layer, {size}", "s", fits, _LPO_SECONDS_BAR),
            *(Amount(f"{name}, one batch", "s", values) for name, values in times.items()),
        ),
    )


def repeated(cache: CovarianceCache, count: int) -> CovarianceCache:
    """A cache with more examples: those of another one repeated, with logits and labels of an overconfident model."""
    chosen = torch.arange(count) % len(cache.logits)
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(count, cache.logits.shape[1], generator=generator, dtype=cache.logits.dtype)
    labels = torch.multinomial((logits / 2).softmax(-1), 1, generator=generator).squeeze(1)
    rows = {name: getattr(cache, name)[chosen] for name in ("embedding", "prior", "binned")}
    return replace(cache, logits=logits, labels=labels, **rows)
