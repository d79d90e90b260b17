import pytest
import torch

from bmoe_lightning.laplace.uncertainty_scores import (
    one_minus_max_probability,
    relative_variance,
    uncertainty_scores,
)


def gaussians(number=6, classes=4, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(number, classes, generator=generator, dtype=torch.float64)
    root = scale * torch.randn(number, classes, classes, generator=generator, dtype=torch.float64)
    return logits, root @ root.mT


def test_against_brute_force_sampling():
    logits, covariance = gaussians()
    found = uncertainty_scores(logits, covariance, 3 * covariance, num_samples=40_000)
    generator = torch.Generator().manual_seed(9)
    for n in range(6):
        noise = torch.randn(400_000, 4, generator=generator, dtype=torch.float64)
        samples = logits[n] + noise @ torch.linalg.cholesky(covariance[n]).T
        p = samples.softmax(1)
        mean = p.mean(0)
        entropy = -(mean * mean.log()).sum()
        conditional = -(p * p.clamp(min=1e-300).log()).sum(1).mean()
        assert found["max_probability"][n].item() == pytest.approx(1 - mean.max().item(), abs=0.01)
        assert found["entropy"][n].item() == pytest.approx(entropy.item(), abs=0.015)
        assert found["mutual_information"][n].item() == pytest.approx((entropy - conditional).item(), abs=0.01)
        centred = samples - samples.mean(1, keepdim=True)
        assert found["logit_variance"][n].item() == pytest.approx(centred.var(0).sum().item() / 3, rel=0.02)
        assert found["relative_variance"][n].item() == pytest.approx(1 / 3)


def test_without_variance_nothing_is_epistemic():
    logits, covariance = gaussians()
    found = uncertainty_scores(logits, torch.zeros_like(covariance), covariance, num_samples=100)
    p = logits.softmax(1)
    torch.testing.assert_close(found["entropy"], -(p * p.log()).sum(1))
    for name in ("mutual_information", "logit_variance", "relative_variance"):
        assert float(found[name].abs().max()) < 1e-12


@pytest.mark.parametrize(
    "name", ["max_probability", "entropy", "mutual_information", "logit_variance", "relative_variance"]
)
def test_every_score_grows_with_the_variance(name):
    """The direction: higher is more uncertain."""
    logits, covariance = gaussians()
    logits[:, 0] += 6  # sure of class 0 in the mean
    scores = [uncertainty_scores(logits, s * covariance, 10 * covariance, num_samples=4000)[name] for s in (0.1, 1, 5)]
    assert bool((scores[0] < scores[1]).all() & (scores[1] < scores[2]).all())


def test_absent_classes_and_one_class_alone():
    logits, covariance = gaussians(3, 3)
    wide = torch.nn.functional.pad(logits, (0, 1), value=-torch.inf)
    padded = torch.nn.functional.pad(covariance, (0, 1, 0, 1))
    few, many = (uncertainty_scores(*args, num_samples=2000) for args in ((logits, covariance), (wide, padded)))
    for name, score in few.items():
        torch.testing.assert_close(score, many[name], rtol=0, atol=1e-9)
    alone = torch.tensor([[0.3, -torch.inf]], dtype=torch.float64)
    zero = torch.zeros(1, 2, 2, dtype=torch.float64)
    assert all(score.item() == 0 for score in uncertainty_scores(alone, zero, zero, num_samples=10).values())


def test_probabilities_that_round_to_one_are_told_apart():
    log_probs = torch.tensor([[-1e-20, -46.0], [-1e-25, -57.0]], dtype=torch.float64)
    assert one_minus_max_probability(log_probs).tolist() == pytest.approx([1e-20, 1e-25])


def test_relative_variance_is_zero_where_no_weight_matters():
    logits, covariance = gaussians(2)
    covariance[0] = 0
    assert relative_variance(logits, covariance, covariance).tolist() == pytest.approx([0.0, 1.0])


@pytest.mark.parametrize("classes", [2, 3, 7])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("rounded_to", [torch.float32, torch.float64])
def test_relative_variance_is_zero_where_logits_only_move_together(classes, scale, rounded_to):
    """Centring leaves rounding in both variances, whose ratio means nothing."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(20, classes, generator=generator, dtype=torch.float64)
    common = torch.randn(20, 1, 5, generator=generator, dtype=torch.float64).expand(20, classes, 5)
    noise = torch.finfo(rounded_to).eps * torch.randn(20, classes, 5, generator=generator, dtype=torch.float64)
    gradients = common * (1 + noise / 2)
    prior = scale * gradients @ gradients.mT
    posterior = scale * gradients @ torch.diag(torch.linspace(0.1, 1, 5).double()) @ gradients.mT
    assert relative_variance(logits, posterior, prior).tolist() == [0.0] * 20
    apart = gradients + 1e-5 * torch.randn(20, classes, 5, generator=generator, dtype=torch.float64)
    assert bool((relative_variance(logits, scale * apart @ apart.mT / 2, scale * apart @ apart.mT) > 0.4).all())


def test_what_is_not_finite_is_refused():
    logits, covariance = gaussians()
    covariance[0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"finite|NaN"):
        uncertainty_scores(logits, covariance)
