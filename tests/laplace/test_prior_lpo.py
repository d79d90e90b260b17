"""Prior precisions from the NLL of a validation split (LPO), and the cache of its covariance terms."""

import math
import warnings
from dataclasses import replace

import pytest
import torch
from oracles.models import answer_logits, as_modules, split, toy_batch

from bmoe_lightning.curvature import collect_factors
from bmoe_lightning.laplace import LaplacePosterior
from bmoe_lightning.laplace.compact_cache import cholesky
from bmoe_lightning.laplace.predictive import mean_variance, standard_normal, temperature_from_variances
from bmoe_lightning.laplace.prior import (
    LogNormalPrior,
    _Objective,
    _quasi_newton,
    _starts,
    fit_lpo,
)
from bmoe_lightning.laplace.validation_cache import ValidationCache
from bmoe_lightning.utils.fit_warnings import FitWarning


def direct_nll(fitted, precision, num_samples=20_000, seed=3):
    """Through `predict`, without the cache."""
    model, posterior, batches = fitted
    at = posterior.with_prior_precision(precision)
    total = torch.tensor(0.0, dtype=torch.float64)
    for batch in batches:
        log_probs = at.predict(model, answer_logits, batch, num_samples=num_samples, seed=seed)
        total -= log_probs.gather(1, batch["labels"].unsqueeze(1)).sum()
    return float(total) / 90


def part_of(cache, count):
    """The first examples of a cache."""
    parts = {name: getattr(cache, name)[:count] for name in ("logits", "labels", "embedding", "prior", "binned")}
    return replace(cache, **parts)


@pytest.mark.parametrize("precision", [1e-2, 0.3, 5.0, 100.0])
def test_cached_covariance_is_the_direct_one(fitted, cache, precision):
    """Up to the bins of s: a tenth of a decade each, shared between neighbours."""
    model, posterior, batches = fitted
    at = posterior.with_prior_precision(torch.tensor([precision, 2 * precision, 5 * precision]))
    direct = torch.cat([at.logit_covariance(model, answer_logits, batch, centred=True)[1] for batch in batches])
    found = cache.covariance(at.prior_precision)
    error = (found - direct).flatten(1).norm(dim=1) / direct.flatten(1).norm(dim=1)
    assert float(error.max()) < 5e-3


@pytest.mark.parametrize("precisions", [(0.1,) * 3, (2.0,) * 3, (0.05, 3.0, 200.0)])
def test_objective_is_the_nll_through_predict(fitted, cache, precisions):
    """Closely at the same noise in the same contrasts; within the sampling error through `predict` itself."""
    precision = torch.tensor(precisions, dtype=torch.float64)
    objective = _Objective(cache, 2000, 0)
    model, posterior, batches = fitted
    at = posterior.with_prior_precision(precision)
    noise = standard_normal(2000, 3, 0)
    nll = []
    for batch in batches:
        terms = at.batch_terms(model, answer_logits, batch)
        inverse = torch.linalg.pinv(terms.embedding)
        contrast = inverse @ at.covariance_of(terms) @ inverse.mT
        root = terms.embedding @ torch.linalg.cholesky(contrast + 1e-10 * torch.eye(3, dtype=torch.float64))
        samples = (terms.logits.unsqueeze(1) + noise @ root.mT).log_softmax(-1)
        chosen = samples.gather(2, batch["labels"].view(-1, 1, 1).expand(-1, 2000, 1)).squeeze(2)
        nll.append(math.log(2000) - chosen.logsumexp(1))
    assert float(objective(precision.log())) == pytest.approx(float(torch.cat(nll).mean()), abs=1e-3)
    assert float(_Objective(cache, 20_000, 0)(precision.log())) == pytest.approx(
        direct_nll(fitted, precision), abs=0.02
    )


def test_global_lpo_is_the_minimum_of_a_grid(fitted, cache):
    found = fit_lpo(cache, "global", num_samples=200)
    assert float(found.max()) == float(found.min())
    objective = _Objective(cache, 200, 0)
    grid = torch.linspace(math.log(1e-4), math.log(1e8), 200, dtype=torch.float64)
    values = torch.stack([objective(x.expand(3)) for x in grid])
    best = float(objective(found.log()))
    assert best <= float(values.min()) + 1e-6
    # An inner minimum, which also is one without the cache.
    assert float(values[0]) > best + 0.02 < float(values[-1])
    at_best = direct_nll(fitted, found)
    assert at_best < direct_nll(fitted, found / 10)
    assert at_best < direct_nll(fitted, found * 10)


def test_lpo_by_layer_is_never_worse(cache):
    for seed in range(3):
        objective = _Objective(cache, 100, seed)
        one = float(objective(fit_lpo(cache, "global", num_samples=100, seed=seed).log()))
        found = fit_lpo(cache, "layer", num_samples=100, seed=seed)
        assert float(objective(found.log())) <= one
        assert float(found.log().std()) > 0.1
    grid = torch.cartesian_prod(*[torch.linspace(-6, 12, 7, dtype=torch.float64)] * 3)
    assert float(objective(found.log())) <= min(float(objective(x)) for x in grid) + 2e-3


class TestSeveralMinima:
    """LPO where one precision for all layers is best without any posterior, but a precision for each is not."""

    def test_inner_minima_are_starts_too(self):
        found = _starts(lambda x: -math.exp(-(x**2)) - 2 / (1 + math.exp(-4 * (x - 12))))
        assert found[0] > 13
        assert any(abs(x) < 0.01 for x in found)

    def test_a_flat_end_is_left_at_the_point_where_it_begins(self):
        assert _starts(lambda x: max(0.0, 5 - x) - 1e-6 * x) == pytest.approx([18.42, 4.6], abs=0.02)

    def test_a_layer_that_helps_is_found_beside_one_that_harms(self):
        # Layer 0 spreads the logits of examples that are right, layer 1 those of examples that are wrong.
        right, wrong = 60, 2
        count = right + wrong
        logits = torch.tensor([[3.0, 0.0]], dtype=torch.float64).expand(count, 2).contiguous()
        labels = torch.cat([torch.zeros(right), torch.ones(wrong)]).long()
        variances = torch.zeros(count, 2, 1, 1, dtype=torch.float64)
        variances[:right, 0], variances[right:, 1] = 30, 30
        embedding = torch.tensor([[-0.5], [0.5]], dtype=torch.float64).expand(count, 2, 1).contiguous()
        cache = ValidationCache(
            logits, labels, embedding, variances, variances.new_zeros(count, 2, 0, 1, 1), variances.new_zeros(2, 0)
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FitWarning)
            single, layers = (fit_lpo(cache, scope, num_samples=200) for scope in ("global", "layer"))
        loss = _Objective(cache, 200, 0)
        assert float(single.min()) > 1e4
        assert layers[0] > 1e3 > 100 > layers[1]
        assert float(loss(layers.log())) < float(loss(single.log())) - 0.02


class TestPriorOnPrecisions:
    """LPO with a penalty on the log precisions, against a dense grid through `predict` and its closed form."""

    CENTRE = torch.tensor([0.5, 2.0, 8.0], dtype=torch.float64)

    def test_penalty_by_hand(self):
        prior = LogNormalPrior(self.CENTRE, 2.0)
        assert float(prior.penalty(self.CENTRE.log())) == 0
        moved = self.CENTRE.log() + torch.tensor([1.0, 0.0, -2.0], dtype=torch.float64)
        assert float(prior.penalty(moved)) == pytest.approx(5 / 8)

    @pytest.mark.parametrize("width", [0.3, 2.0])
    def test_a_global_precision_is_the_minimum_of_a_grid(self, fitted, cache, width):
        prior = LogNormalPrior(self.CENTRE, width)
        found = float(fit_lpo(cache, "global", prior=prior, num_samples=500).log()[0])

        def objective(x):
            spread = (x - self.CENTRE.log()).square().sum() / (2 * width**2)
            return 90 * direct_nll(fitted, torch.full((3,), math.exp(x)), num_samples=500, seed=0) + float(spread)

        # Other samples than the objective's: the minimum is where it is to the noise of those.
        best = min((found + 0.25 * step for step in range(-12, 13)), key=objective)
        assert abs(found - best) <= 0.5

    def test_layers_are_a_minimum_of_the_penalised_sum(self, cache):
        prior = LogNormalPrior(self.CENTRE, 1.0)
        found = fit_lpo(cache, "layer", prior=prior, num_samples=200).log()
        loss = _Objective(cache, 200, 0)

        def objective(x):
            return 90 * float(loss(x)) + float((x - self.CENTRE.log()).square().sum() / 2)

        at_best = objective(found)
        for layer in range(3):
            for step in (-0.1, 0.1):
                assert objective(found + step * torch.eye(3, dtype=torch.float64)[layer]) > at_best

    def test_limits(self, cache):
        tight = fit_lpo(cache, "layer", prior=LogNormalPrior(self.CENTRE, 1e-3), num_samples=100)
        assert tight.tolist() == pytest.approx(self.CENTRE.tolist(), rel=1e-3)
        loose = fit_lpo(cache, "global", prior=LogNormalPrior(self.CENTRE, 1e4), num_samples=100)
        assert loose.tolist() == pytest.approx(fit_lpo(cache, "global", num_samples=100).tolist(), rel=5e-3)

    def test_more_labels_move_further_from_the_centre(self, cache):
        prior = LogNormalPrior(torch.full((3,), 1e3, dtype=torch.float64), 1.0)
        few, many = (part_of(cache, count) for count in (5, 90))
        distances = [float(prior.penalty(fit_lpo(part, prior=prior, num_samples=100).log())) for part in (few, many)]
        assert distances[0] < distances[1]

    @pytest.mark.parametrize("width", [0.0, -1.0, math.nan, math.inf])
    def test_refuses_a_bad_width(self, width):
        with pytest.raises(ValueError, match="width of a prior on log precision"):
            LogNormalPrior(self.CENTRE, width)

    @pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
    def test_refuses_a_bad_centre(self, value):
        with pytest.raises(ValueError, match="centre of a prior on log precision"):
            LogNormalPrior(torch.tensor([1.0, value]), 1.0)


def test_best_iterate_is_kept():
    """Also when every later one is worse than the start."""
    calls = []

    def objective(log_precision):
        calls.append(1)
        return (log_precision - 3).square().sum() + 1e3 * len(calls)

    start = torch.tensor([1.0, 2.0], dtype=torch.float64)
    assert torch.equal(_quasi_newton(objective, start, 5), start)
    found = _quasi_newton(lambda x: (x - torch.tensor([3.0, -1.0])).square().sum(), start, 20)
    torch.testing.assert_close(found, torch.tensor([3.0, -1.0], dtype=torch.float64), rtol=0, atol=1e-4)


def test_lpo_is_repeatable_and_takes_one_pass(fitted):
    model, posterior, batches = fitted
    calls = []

    def counted(m, batch):
        calls.append(len(batch["ids"]))
        return answer_logits(m, batch)

    before = torch.get_rng_state()
    first = posterior.fit_prior_lpo(model, counted, iter(batches), num_samples=100)
    assert calls == [40, 50]
    assert torch.equal(torch.get_rng_state(), before)
    again = posterior.fit_prior_lpo(model, counted, batches, num_samples=100)
    assert torch.equal(first.prior_precision, again.prior_precision)
    one = posterior.fit_prior_lpo(model, counted, batches, scope="global", num_samples=100)
    assert float(one.prior_precision.min()) == float(one.prior_precision.max())
    assert torch.equal(posterior.prior_precision, torch.ones(3, dtype=torch.float64))  # a new posterior each time


def test_a_module_list_gives_the_same(fitted):
    model, posterior, batches = fitted
    copy, options = as_modules(model), {"scope": "global", "num_samples": 100}
    factors = collect_factors(copy, answer_logits, [toy_batch(num_rows=60, seed=11)], rank=3)
    found = LaplacePosterior(factors).fit_prior_lpo(copy, answer_logits, batches, **options)
    expected = posterior.fit_prior_lpo(model, answer_logits, batches, **options)
    torch.testing.assert_close(found.prior_precision, expected.prior_precision, rtol=1e-3, atol=0)


def test_ragged_validation_set(fitted):
    model, posterior, batches = fitted
    batches = [dict(batch) for batch in batches]
    for batch in batches:
        absent = torch.zeros(len(batch["ids"]), 4, dtype=torch.bool)
        absent[::3] = torch.nn.functional.one_hot((batch["labels"][::3] + 1) % 4, 4).bool()
        batch["absent"] = absent
    cache = posterior.validation_cache(model, answer_logits, batches)
    at = posterior.with_prior_precision(0.7)
    direct = torch.cat([at.logit_covariance(model, answer_logits, batch, centred=True)[1] for batch in batches])
    error = (cache.covariance(at.prior_precision) - direct).flatten(1).norm(dim=1) / direct.flatten(1).norm(dim=1)
    assert float(error.max()) < 5e-3
    found = fit_lpo(cache, "layer", num_samples=50)
    assert bool((found.isfinite() & (found > 0)).all())


def test_evidence_temperature_from_the_cache_is_the_direct_one(fitted, cache):
    model, posterior, _ = fitted
    inputs = split(toy_batch(num_rows=120, seed=21), 50, 70)
    unlabelled = [{name: value for name, value in batch.items() if name != "labels"} for batch in inputs]
    at = posterior.with_prior_precision(0.4)
    pairs = [at.logit_covariance(model, answer_logits, batch) for batch in inputs]
    variances = torch.cat([mean_variance(*pair) for pair in pairs])
    direct = temperature_from_variances(variances)
    assert direct == pytest.approx(math.sqrt(1 + math.pi / 4 * float(variances.median())), rel=0.02)
    for batches in (inputs, unlabelled):
        found = posterior.validation_cache(model, answer_logits, batches)
        cached = temperature_from_variances(mean_variance(found.logits, found.covariance(at.prior_precision)))
        assert cached == pytest.approx(direct, rel=2e-3)
    assert found.labels is None


def test_lpo_refusals(fitted, cache):
    model, posterior, batches = fitted
    with pytest.raises(ValueError, match="empty calibration split"):
        posterior.fit_prior_lpo(model, answer_logits, [])
    with pytest.raises(ValueError, match="held-out labels are needed"):
        posterior.fit_prior_lpo(model, lambda m, b: (answer_logits(m, b)[0], None), batches)
    with pytest.raises(ValueError, match="unknown scope 'expert'"):
        fit_lpo(cache, "expert")


def test_an_answer_that_is_absent_is_refused(fitted):
    """Its probability is zero whatever the precision."""
    model, posterior, batches = fitted
    batch = dict(batches[0])
    batch["absent"] = torch.nn.functional.one_hot(batch["labels"], 4).bool()
    with pytest.raises(ValueError, match="labels name a class that their example does not have"):
        posterior.fit_prior_lpo(model, answer_logits, [batch], num_samples=10)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda labels: labels.float(), "as torch.float32"),
        (lambda labels: labels.index_fill(0, torch.tensor([1]), -100), "labels -100 for K = 4"),
        (lambda labels: labels + 1, "counted from 1"),
        (lambda labels: labels > 1, "as torch.bool"),
    ],
)
def test_labels_that_no_class_has_are_refused(fitted, spoil, message):
    model, posterior, batches = fitted
    labels = torch.tensor([3, 2, 1, 3, 2])[: len(batches[0]["labels"])]
    batch = {**batches[0], "labels": spoil(labels)}
    batch = {name: value[: len(labels)] for name, value in batch.items()}
    with pytest.raises(ValueError, match=message):
        posterior.fit_prior_lpo(model, answer_logits, [batch], num_samples=10)


def test_lpo_refuses_what_is_not_finite(cache):
    broken = cache.prior.clone()
    broken[0, 0, 0, 0] = torch.inf
    with pytest.raises(ValueError, match="covariance terms of the validation set are not finite"):
        fit_lpo(replace(cache, prior=broken), num_samples=10)


@pytest.mark.parametrize("scale", [1e4, 1e30])
def test_lpo_at_extreme_logits(cache, scale):
    """Of a model whose head is scaled: covariances grow by its square. Larger gaps are those of absent classes."""
    huge = replace(cache, logits=200 * cache.logits, prior=scale**2 * cache.prior, binned=scale**2 * cache.binned)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = fit_lpo(huge, "layer", num_samples=20, max_iterations=5)
    assert bool((found.isfinite() & (found > 0)).all())


def test_a_covariance_that_rounding_made_indefinite_still_has_a_root():
    good = torch.eye(3, dtype=torch.float64)
    bad = torch.tensor([[1.0, 1, 0], [1, 1 - 1e-7, 0], [0, 0, 1e-9]], dtype=torch.float64)
    root = cholesky(torch.stack([good, bad]))
    assert torch.equal(root[0], good)
    torch.testing.assert_close(root[1] @ root[1].mT, bad, rtol=0, atol=1e-5)
