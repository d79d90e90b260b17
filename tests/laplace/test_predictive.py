import math
from decimal import Decimal, getcontext

import numpy as np
import pytest
import torch

from bmoe_lightning.laplace import predictive
from bmoe_lightning.laplace.predictive import (
    LINKS,
    NUM_SAMPLES,
    centred,
    class_probabilities,
    isotropic,
    laplace_bridge,
    mean_variance,
    monte_carlo,
    predict_with_uncertainty,
    probit,
    square_root,
    standard_normal,
    temperature_from_variances,
)
from bmoe_lightning.laplace.present import present_first
from bmoe_lightning.utils.fit_warnings import FitWarning


def gaussian(num_examples=6, num_classes=4, scale=1.0):
    """Logits and a positive definite covariance."""
    logits = 2 * torch.randn(num_examples, num_classes, dtype=torch.float64)
    root = scale * torch.randn(num_examples, num_classes, num_classes, dtype=torch.float64)
    return logits, root @ root.mT


def ragged():
    """Examples with 4, 3 and 2 classes, rows and columns of absent classes zero."""
    logits, covariance = gaussian(3)
    absent = torch.tensor([[False] * 4, [False, True, False, False], [True, False, False, True]])
    outside = absent.unsqueeze(1) | absent.unsqueeze(2)
    return logits.masked_fill(absent, -torch.inf), covariance.masked_fill(outside, 0), ~absent


def sub(logits, covariance, present, n):
    """One example alone, its absent classes cut out."""
    keep = present[n].nonzero().flatten()
    return logits[n, keep].unsqueeze(0), covariance[n][keep][:, keep].unsqueeze(0), keep


def integral(mean, variance):
    """`E[sigmoid(x)]`, `x ~ N(mean, variance)`, on a fine grid."""
    z = torch.linspace(-12, 12, 48_001, dtype=torch.float64)
    weights = torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)
    return float(torch.trapezoid(torch.sigmoid(mean + math.sqrt(variance) * z) * weights, z))


@pytest.mark.parametrize("link", ["mc", "isotropic"])
def test_two_classes_against_an_integral(link):
    logits, covariance = gaussian(8, 2)
    found = class_probabilities(logits, covariance, link, num_samples=100_000).exp()
    for n in range(8):
        # Only the difference of the two logits matters; v I has the variance 2 v = that of the difference.
        contrast = torch.tensor([1.0, -1.0], dtype=torch.float64)
        expected = integral(float(contrast @ logits[n]), float(contrast @ covariance[n] @ contrast))
        assert float(found[n, 0]) == pytest.approx(expected, abs=0.006)
        assert float(found[n, 1]) == pytest.approx(1 - expected, abs=0.006)


def test_monte_carlo_averages_probabilities_and_not_logits():
    """At mean (3, 0, 0, 0) and covariance 9 I, averaged logits give the MAP's .87."""
    logits = torch.tensor([[3.0, 0, 0, 0]], dtype=torch.float64)
    found = monte_carlo(logits, 9 * torch.eye(4, dtype=torch.float64).unsqueeze(0), 100_000)
    assert float(found.exp()[0, 0]) == pytest.approx(0.526, abs=0.005)
    assert float(logits.softmax(-1)[0, 0]) == pytest.approx(0.870, abs=0.001)


def test_sampling_error_is_as_stated():
    """A standard deviation of .004 on a probability where logits vary by 3, at the default number of samples."""
    logits = torch.tensor([[3.0, 0, 0, 0]], dtype=torch.float64)
    covariance = 9 * torch.eye(4, dtype=torch.float64).unsqueeze(0)
    draws = torch.stack([monte_carlo(logits, covariance, NUM_SAMPLES, seed).exp()[0, 0] for seed in range(40)])
    assert NUM_SAMPLES == 10_000
    assert 0.0025 < float(draws.std()) < 0.0055


def test_noise_is_seeded_common_and_private():
    logits, covariance = gaussian()
    before = torch.get_rng_state()
    first, again = (monte_carlo(logits, covariance, 500, seed=3) for _ in range(2))
    other = monte_carlo(logits, covariance, 500, seed=4)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    alone = monte_carlo(logits[2:3], covariance[2:3], 500, seed=3)
    torch.testing.assert_close(alone, first[2:3], rtol=1e-12, atol=0)


@pytest.mark.parametrize("link", LINKS)
def test_log_probabilities_are_normalised(link):
    logits, covariance = gaussian(20, 5, scale=3.0)
    found = class_probabilities(logits, covariance, link, num_samples=2000)
    assert found.shape == (20, 5)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found.logsumexp(-1), torch.zeros(20, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("link", ["mc", "isotropic"])
def test_log_probabilities_do_not_underflow(link):
    logits = torch.tensor([[0.0, -2000.0, -3000.0]], dtype=torch.float64)
    found = class_probabilities(logits, torch.eye(3, dtype=torch.float64).unsqueeze(0) * 1e-6, link)
    torch.testing.assert_close(found, logits, rtol=1e-3, atol=1e-12)


@pytest.mark.parametrize("link", ["mc", "isotropic", "probit"])
def test_no_variance_is_the_softmax(link):
    logits, covariance = gaussian()
    found = class_probabilities(logits, torch.zeros_like(covariance), link, num_samples=10)
    torch.testing.assert_close(found, logits.log_softmax(-1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("link", LINKS)
def test_a_common_shift_does_not_matter(link):
    """Neither of the logits nor along the ones in the covariance; the noise then enters in other directions."""
    logits, covariance = gaussian()
    common = torch.eye(4, dtype=torch.float64) + torch.ones(4, 1) * torch.randn(6, 1, 4, dtype=torch.float64)
    shifted = common @ covariance @ common.mT  # each sample gains a random multiple of the ones
    tolerance = 0.02 if link == "mc" else 1e-9
    found = class_probabilities(logits + 5, shifted, link, num_samples=100_000).exp()
    expected = class_probabilities(logits, covariance, link, num_samples=100_000).exp()
    assert float((found - expected).abs().max()) < tolerance


@pytest.mark.parametrize("link", LINKS)
def test_ragged_classes(link):
    """An example with absent classes is predicted as if it had only the others."""
    logits, covariance, present = ragged()
    found = class_probabilities(logits, covariance, link, num_samples=100_000)
    assert torch.equal(found == -torch.inf, ~present)
    assert not bool(found.isnan().any())
    for n in range(3):
        alone_logits, alone_covariance, keep = sub(logits, covariance, present, n)
        alone = class_probabilities(alone_logits, alone_covariance, link, num_samples=100_000)
        tolerance = 0.008 if link in ("mc", "isotropic") else 1e-9
        assert float((found[n, keep].exp() - alone[0].exp()).abs().max()) < tolerance


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("classes", [(0, 1, 2, 3), (2, 3, 4, 5), (0, 2, 5, 6)], ids=["behind", "before", "between"])
def test_absent_columns_change_no_prediction(link, classes):
    """An example has the same samples alone and beside one with more classes, wherever its absent ones are."""
    logits, covariance = gaussian(6)
    covariance[0] = centred(covariance[:1], torch.ones(1, 4, dtype=torch.bool))
    covariance[1] = torch.ones(4, 4)
    index = torch.tensor(classes)
    wide_logits = torch.full((7, 7), -torch.inf, dtype=torch.float64)
    wide_covariance = torch.zeros(7, 7, 7, dtype=torch.float64)
    wide_logits[:6, index] = logits
    wide_covariance[:6, index.unsqueeze(1), index] = covariance
    wide_logits[6:], wide_covariance[6:] = gaussian(1, 7)
    expected = class_probabilities(logits, covariance, link, num_samples=1001, seed=2)
    for rows in (slice(0, 6), slice(0, 7)):
        found = class_probabilities(wide_logits[rows], wide_covariance[rows], link, num_samples=1001, seed=2)
        torch.testing.assert_close(found[:6, index], expected, rtol=0, atol=1e-7)
    alone = predict_with_uncertainty(logits, covariance, num_samples=500)
    among = predict_with_uncertainty(wide_logits, wide_covariance, num_samples=500)
    torch.testing.assert_close(among.mutual_information[:6], alone.mutual_information, rtol=0, atol=1e-7)


def test_noise_of_a_class_does_not_depend_on_how_many_follow():
    for num_samples in (1, 7, 15, 16, 1000, 1001):
        many = standard_normal(num_samples, 9, 4)
        for num_columns in range(1, 9):
            assert torch.equal(standard_normal(num_samples, num_columns, 4), many[:, :num_columns])


def test_samples_have_the_mean_and_the_covariance_asked_for():
    logits, covariance, present = ragged()
    classes = present_first(logits)
    samples = torch.cat(list(predictive._sample_chunks(logits, covariance, classes, 200_000, 0)))
    for n in range(3):
        mean, wanted, keep = sub(logits, covariance, present, n)
        found = samples[n, : len(keep)]
        scale = float(wanted.diagonal(dim1=1, dim2=2).max())
        torch.testing.assert_close(found.mean(1), mean[0], rtol=0, atol=0.02 * math.sqrt(scale))
        torch.testing.assert_close(found.cov(), wanted[0], rtol=0, atol=0.02 * scale)
        assert bool((samples[n, len(keep) :] == -torch.inf).all())


def test_three_classes_against_quadrature():
    logits, covariance = gaussian(4, 3)
    nodes, weights = (torch.from_numpy(x) for x in np.polynomial.hermite_e.hermegauss(60))
    grid = torch.cartesian_prod(nodes, nodes, nodes)
    mass = torch.cartesian_prod(weights, weights, weights).prod(1) / (2 * math.pi) ** 1.5
    found = monte_carlo(logits, covariance, 100_000).exp()
    for n in range(4):
        samples = logits[n] + grid @ torch.linalg.cholesky(covariance[n]).T
        torch.testing.assert_close(found[n], mass @ samples.softmax(1), rtol=0, atol=0.006)


def test_mean_variance_by_hand():
    covariance = torch.diag(torch.tensor([4.0, 1.0, 1.0], dtype=torch.float64)).unsqueeze(0)
    # tr(C S C) = tr(S) - 1'S1 / K = 6 - 2 = 4, over K - 1 = 2
    assert float(mean_variance(torch.zeros(1, 3, dtype=torch.float64), covariance)) == pytest.approx(2)
    with_absent = torch.zeros(1, 4, 4, dtype=torch.float64)
    with_absent[0, :3, :3] = covariance[0]
    logits = torch.tensor([[0.0, 1.0, 2.0, -torch.inf]], dtype=torch.float64)
    assert float(mean_variance(logits, with_absent)) == pytest.approx(2)
    isotropic_covariance = 7 * torch.eye(5, dtype=torch.float64).unsqueeze(0)
    assert float(mean_variance(torch.zeros(1, 5), isotropic_covariance)) == pytest.approx(7)


def test_centred_is_the_covariance_of_centred_logits():
    _, covariance = gaussian()
    c = torch.eye(4, dtype=torch.float64) - 0.25
    found = centred(covariance, torch.ones(6, 4, dtype=torch.bool))
    torch.testing.assert_close(found, c @ covariance @ c)
    torch.testing.assert_close(centred(found, torch.ones(6, 4, dtype=torch.bool)), found)


def test_isotropic_keeps_the_size_and_drops_the_shape():
    logits, covariance = gaussian()
    v = mean_variance(logits, covariance)
    spread = v.view(-1, 1, 1) * torch.eye(4, dtype=torch.float64)
    torch.testing.assert_close(isotropic(logits, covariance, 300, 1), monte_carlo(logits, spread, 300, 1))


def test_probit_formula():
    logits, covariance = gaussian()
    v = mean_variance(logits, covariance).unsqueeze(1)
    torch.testing.assert_close(probit(logits, covariance), (logits / (1 + math.pi / 4 * v).sqrt()).log_softmax(-1))
    assert torch.equal(probit(logits, covariance).argmax(1), logits.argmax(1))


def test_laplace_bridge_by_hand():
    """Two classes, centred logits (1, -1), centred variances 1/2: worked out on paper."""
    logits = torch.tensor([[2.0, 0.0]], dtype=torch.float64)
    covariance = torch.diag(torch.tensor([1.0, 1.0], dtype=torch.float64)).unsqueeze(0)
    spread = math.e + 1 / math.e
    alpha = [2 * (1 - 1 + math.e / 4 * spread), 2 * (1 - 1 + 1 / (4 * math.e) * spread)]
    expected = torch.tensor([[alpha[0], alpha[1]]], dtype=torch.float64) / sum(alpha)
    torch.testing.assert_close(laplace_bridge(logits, covariance).exp(), expected)

    logits = torch.tensor([[1.0, 0.0, -1.0]], dtype=torch.float64)
    covariance = torch.diag(torch.tensor([2.0, 0.5, 1.0], dtype=torch.float64)).unsqueeze(0)
    # Diagonal of C S C: S_kk (1 - 2/3) + tr(S) / 9.
    variances = [s / 3 + 3.5 / 9 for s in (2.0, 0.5, 1.0)]
    spread = sum(math.exp(-m) for m in (1, 0, -1))
    alpha = [(1 - 2 / 3 + math.exp(m) / 9 * spread) / v for m, v in zip((1, 0, -1), variances, strict=True)]
    expected = torch.tensor([alpha], dtype=torch.float64) / sum(alpha)
    torch.testing.assert_close(laplace_bridge(logits, covariance).exp(), expected)


def test_square_root():
    _, covariance = gaussian()
    root = square_root(covariance)
    torch.testing.assert_close(root @ root.mT, covariance)
    torch.testing.assert_close(root, root.mT)
    deficient = torch.ones(1, 3, 3, dtype=torch.float64)
    root = square_root(deficient)
    torch.testing.assert_close(root @ root.mT, deficient)
    almost = deficient - 1e-9 * torch.eye(3, dtype=torch.float64)
    assert bool(square_root(almost).isfinite().all())


@pytest.mark.parametrize("link", ["mc", "isotropic"])
def test_indefinite_covariance_is_refused(link):
    indefinite = torch.tensor([[[1.0, 2.0], [2.0, 1.0]]], dtype=torch.float64)
    negative = -torch.eye(2, dtype=torch.float64).unsqueeze(0)
    with pytest.raises(ValueError, match="not positive semi-definite"):
        square_root(indefinite)
    bad = indefinite if link == "mc" else negative
    with pytest.raises(ValueError, match="not positive semi-definite"):
        class_probabilities(torch.zeros(1, 2, dtype=torch.float64), bad, link)


def test_bad_arguments():
    logits, covariance = gaussian()
    with pytest.raises(ValueError, match="unknown link 'softmax'; valid are mc, isotropic, probit, laplace_bridge"):
        class_probabilities(logits, covariance, "softmax")
    with pytest.raises(ValueError, match="num_samples must be at least 1, got 0"):
        class_probabilities(logits, covariance, "mc", num_samples=0)


def test_uncertainty_of_a_prediction():
    logits, covariance = gaussian(scale=2.0)
    found = predict_with_uncertainty(logits, covariance, num_samples=4000, seed=2)
    torch.testing.assert_close(found.log_probs, monte_carlo(logits, covariance, 4000, 2))
    assert torch.equal(found.logits, logits)
    assert torch.equal(found.covariance, covariance)
    p = found.log_probs.exp()
    torch.testing.assert_close(found.entropy, -(p * p.log()).sum(1))
    # Mutual information: entropy of the mean less the mean of the entropies, by an independent draw.
    root = torch.linalg.cholesky(covariance + 1e-12 * torch.eye(4, dtype=torch.float64))
    noise = torch.randn(200_000, 4, dtype=torch.float64)
    for n in range(6):
        q = (logits[n] + noise @ root[n].T).softmax(-1)
        expected = -(q.mean(0) * q.mean(0).log()).sum() + (q * q.clamp(min=1e-300).log()).sum(1).mean()
        assert float(found.mutual_information[n]) == pytest.approx(float(expected), abs=0.03)
    assert bool((found.mutual_information <= found.entropy).all())

    certain = predict_with_uncertainty(logits, torch.zeros_like(covariance), num_samples=10)
    assert float(certain.mutual_information.max()) < 1e-12
    torch.testing.assert_close(certain.entropy, -(logits.softmax(-1) * logits.log_softmax(-1)).sum(1))


def test_uncertainty_of_ragged_classes():
    logits, covariance, present = ragged()
    found = predict_with_uncertainty(logits, covariance, num_samples=2000)
    assert bool(found.entropy.isfinite().all() & found.mutual_information.isfinite().all())
    assert bool((found.entropy <= present.sum(1).double().log() + 1e-9).all())


def test_temperature_is_from_the_median():
    variances = torch.ones(101, dtype=torch.float64)
    variances[:50] = 1e6
    assert temperature_from_variances(variances) == pytest.approx(math.sqrt(1 + math.pi / 4))
    even = torch.cat([torch.zeros(50), torch.full((50,), 8.0)])
    assert temperature_from_variances(even) == pytest.approx(math.sqrt(1 + math.pi))
    with pytest.raises(ValueError, match="at least 100 unlabelled inputs, got 99"):
        temperature_from_variances(torch.ones(99))


def exact_bridge(logits, variances):
    """The bridge in exact rational exponents: log alpha by Python's decimals, for logits of any size."""
    getcontext().prec = 60
    f = [Decimal(x) for x in logits]
    count = Decimal(len(f))
    total = sum((-x).exp() for x in f)
    alpha = [(1 - 2 / count + x.exp() * total / count**2) / Decimal(v) for x, v in zip(f, variances, strict=True)]
    return [float((a / sum(alpha)).ln()) for a in alpha]


@pytest.mark.parametrize("size", [1.0, 300.0, 800.0, 10_000.0])
@pytest.mark.parametrize("shape", [(1.0, 0.0, -1.0), (1.0, -1.0), (1.0, 1.0, -1.0, 0.5)])
def test_bridge_is_exact_at_any_size_of_logits(size, shape):
    logits = size * torch.tensor([shape], dtype=torch.float64)
    covariance = torch.diag_embed(torch.arange(1.0, len(shape) + 1, dtype=torch.float64).unsqueeze(0))
    present = torch.ones(1, len(shape), dtype=torch.bool)
    variances = centred(covariance, present).diagonal(dim1=1, dim2=2)[0].tolist()
    expected = torch.tensor([exact_bridge(logits[0].tolist(), variances)], dtype=torch.float64)
    torch.testing.assert_close(laplace_bridge(logits, covariance), expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(laplace_bridge(logits + 1e5, covariance), expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("scale", [1.0, 1e3, 1e4, 1e30])
def test_extreme_logits_give_normalised_probabilities(link, scale):
    logits, covariance, present = ragged()
    for variance in (1e-30, 1.0, scale**2):
        found = class_probabilities(scale * logits, variance * covariance, link, num_samples=200)
        assert bool(found[present].isfinite().all())
        assert bool((found[~present] == -torch.inf).all())
        torch.testing.assert_close(found.logsumexp(1), torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-9)


@pytest.mark.parametrize("link", LINKS)
def test_what_is_not_finite_is_refused(link):
    logits, covariance = gaussian(2)
    broken = covariance.clone()
    broken[0, 0, 0] = torch.inf
    with pytest.raises(ValueError, match="are not finite"):
        class_probabilities(logits, broken, link, num_samples=10)
    with pytest.raises(ValueError, match="are not finite"):
        class_probabilities(logits.masked_fill(logits == logits.max(), torch.nan), covariance, link, num_samples=10)


def test_memory_of_samples_is_bounded_and_their_number_is_not(monkeypatch):
    logits, covariance = gaussian(7)
    expected = monte_carlo(logits, covariance, 50)
    whole = predict_with_uncertainty(logits, covariance, num_samples=50)
    monkeypatch.setattr(predictive, "_CHUNK_FLOATS", 50 * 4 * 2)
    assert torch.equal(monte_carlo(logits, covariance, 50), expected)
    parts = predict_with_uncertainty(logits, covariance, num_samples=50)
    assert torch.equal(parts.mutual_information, whole.mutual_information)
    assert torch.equal(parts.log_probs, whole.log_probs)


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0])
def test_an_evidence_temperature_of_no_meaning_is_refused(value):
    with pytest.raises(ValueError, match="negative values, NaN or infinity"):
        temperature_from_variances(torch.full((100,), value))


def test_an_evidence_temperature_that_makes_all_uniform_is_said():
    with pytest.warns(FitWarning, match=r"evidence temperature 1.77e\+08 makes every prediction nearly uniform"):
        assert temperature_from_variances(torch.full((100,), 4e16)) == pytest.approx(1.77e8, rel=0.01)


def test_monte_carlo_equals_the_mean_in_the_log_domain():
    """Rows whose probabilities underflow included, whatever the batch and however often the noise was drawn."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(5, 6, generator=generator, dtype=torch.float64)
    logits[1, 2] = -torch.inf
    logits[2] *= 500
    root = torch.randn(5, 6, 6, generator=generator, dtype=torch.float64)
    covariance = root @ root.mT
    covariance[1, 2], covariance[1, :, 2] = 0, 0
    noise = standard_normal(1000, 6, 3).expand(5, -1, -1).clone()
    noise[1, :, 3:] = noise[1, :, 2:5].clone()  # present classes have the first columns
    samples = (logits.unsqueeze(1) + noise @ square_root(covariance).mT).log_softmax(-1)
    expected = torch.logsumexp(samples, dim=1) - math.log(1000)
    for _ in range(2):
        torch.testing.assert_close(monte_carlo(logits, covariance, 1000, 3), expected, rtol=1e-12, atol=1e-12)
    assert float(expected[2].min()) < -745  # no number in float64
    torch.testing.assert_close(monte_carlo(logits[:2], covariance[:2], 1000, 3), expected[:2], rtol=1e-12, atol=1e-12)
    single = monte_carlo(logits.float(), covariance.float(), 1000, 3)
    torch.testing.assert_close(single.exp().sum(1), torch.ones(5))


def test_stored_noise_is_bounded():
    for seed in range(20):
        class_probabilities(torch.zeros(1, 2).double(), torch.eye(2).double()[None], num_samples=10, seed=seed)
    assert len(predictive._noise_cache) <= 4
    class_probabilities(torch.zeros(1, 3).double(), torch.eye(3).double()[None], num_samples=1 << 20)
    assert all(noise.numel() <= 1 << 20 for noise in predictive._noise_cache.values())
