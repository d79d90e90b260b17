import pytest
import torch

from bmoe_lightning.curvature.fisher import fisher_weights, label_weights


def hessian(logits):
    p = logits.softmax(-1)
    return torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)


def total(weights):
    return torch.einsum("pbi,pbj->bij", weights, weights)


def draw(num_examples=6, num_classes=5, scale=2.0):
    return scale * torch.randn(num_examples, num_classes, dtype=torch.float64)


@pytest.mark.parametrize("num_classes", [2, 3, 7])
def test_exact_is_the_softmax_hessian(num_classes):
    logits = draw(num_classes=num_classes)
    weights = fisher_weights("exact", logits.log_softmax(-1))
    assert weights.shape == (num_classes - 1, 6, num_classes)
    torch.testing.assert_close(total(weights), hessian(logits), rtol=1e-10, atol=1e-14)


def test_exact_with_absent_classes():
    logits = draw()
    logits[0, 1] = logits[1, 3:] = -torch.inf
    weights = fisher_weights("exact", logits.log_softmax(-1))
    torch.testing.assert_close(total(weights), hessian(logits), rtol=1e-10, atol=1e-14)
    assert float(weights[:, 0, 1].square().max()) < 1e-15  # an absent class has no derivative either way


@pytest.mark.parametrize("mask", ["of all examples", "of each example"])
def test_exact_takes_no_pass_for_classes_that_no_example_has(mask):
    """Twelve columns, of which each example has three: the same ones, or any three."""
    logits = draw(num_classes=12)
    kept = torch.tensor([1, 4, 7]).expand(6, 3) if mask == "of all examples" else torch.rand(6, 12).argsort(1)[:, :3]
    logits = torch.full_like(logits, -torch.inf).scatter(1, kept, logits.gather(1, kept))
    logits[0, kept[0, 0]] = -torch.inf  # one of them has two
    weights = fisher_weights("exact", logits.log_softmax(-1), most_classes=3)
    assert weights.shape == (2, 6, 12)
    torch.testing.assert_close(total(weights), hessian(logits), rtol=1e-10, atol=1e-14)
    assert float(weights.masked_fill(logits > -torch.inf, 0).abs().max()) < 1e-7
    more = fisher_weights("exact", logits.log_softmax(-1), most_classes=5)  # of another rank
    assert more.shape == (4, 6, 12)
    torch.testing.assert_close(total(more), hessian(logits), rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("rest", [1e-9, 1e-14, 1e-20, 1e-30])
def test_a_sure_model_does_not_cancel(rest):
    """At p = 1 - rest the entries are of the size of `rest`; 1 - p in floating point would lose them."""
    log_probs = torch.tensor([[0.0, 0.5 * rest, 0.3 * rest, 0.2 * rest]], dtype=torch.float64).log()
    log_probs[0, 0] = torch.log1p(torch.tensor(-rest, dtype=torch.float64))
    p = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64) * rest
    expected = torch.zeros(4, 4, dtype=torch.float64)
    expected[0, 0], expected[0, 1:], expected[1:, 0] = rest * (1 - rest), -p * (1 - rest), -p * (1 - rest)
    expected[1:, 1:] = torch.diag(p) - torch.outer(p, p)
    found = total(fisher_weights("exact", log_probs))[0]
    torch.testing.assert_close(found / rest, expected / rest, rtol=1e-6, atol=1e-8)

    surprised = label_weights(log_probs, torch.tensor([0]))[0]
    torch.testing.assert_close(surprised[0] / rest, torch.tensor(1.0, dtype=torch.float64), rtol=1e-12, atol=0)


def test_empirical_is_the_score_of_the_label():
    logits = draw().requires_grad_()
    labels = torch.tensor([0, 4, 2, 1, 3, 0])
    chosen = logits.log_softmax(-1).gather(1, labels.unsqueeze(1)).sum()
    expected = torch.autograd.grad(chosen, logits)[0]
    weights = fisher_weights("empirical", logits.detach().log_softmax(-1), labels)
    torch.testing.assert_close(weights, expected.unsqueeze(0), rtol=1e-12, atol=1e-15)


def test_drawn_labels_are_right_on_average():
    logits = draw(num_examples=3, num_classes=4, scale=1.0)
    logits[1, 2] = -torch.inf
    draws = 20_000
    generator = torch.Generator().manual_seed(1)
    repeated = logits.log_softmax(-1).repeat_interleave(draws, dim=0)
    weights = fisher_weights("mc", repeated, generator=generator)[0].view(3, draws, 4)
    mean = torch.einsum("bsi,bsj->bij", weights, weights) / draws
    # Entries lie in [-1, 1], so 5 standard errors are at most 5 / sqrt(draws).
    assert float((mean - hessian(logits)).abs().max()) < 5 / draws**0.5
    assert float((mean - hessian(logits)).abs().max()) > 0
    assert bool((weights[1, :, 2] == 0).all())


def test_drawn_labels_are_repeatable_and_leave_the_global_stream_alone():
    log_probs = draw(num_examples=50).log_softmax(-1)
    before = torch.get_rng_state()
    draws = [fisher_weights("mc", log_probs, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert torch.equal(torch.get_rng_state(), before)


def test_refusals():
    log_probs = draw().log_softmax(-1)
    with pytest.raises(ValueError, match="empirical Fisher needs labels"):
        fisher_weights("empirical", log_probs)
    with pytest.raises(ValueError, match="unknown Fisher 'hutchinson'; valid are exact, mc, empirical"):
        fisher_weights("hutchinson", log_probs)


def drawn(log_probs, seed):
    """The labels of the `mc` Fisher: the one entry of each row of weights that is positive."""
    return fisher_weights("mc", log_probs, generator=torch.Generator().manual_seed(seed))[0].argmax(1)


@pytest.mark.parametrize("classes", [(0, 1, 2), (3, 4, 5), (1, 3, 4)], ids=["behind", "before", "between"])
def test_absent_columns_change_no_drawn_label(classes):
    log_probs = draw(200, 3).log_softmax(-1)
    wide = torch.full((200, 6), -torch.inf, dtype=torch.float64)
    wide[:, classes] = log_probs
    assert torch.equal(drawn(wide, 5), torch.tensor(classes)[drawn(log_probs, 5)])


def test_labels_are_drawn_from_the_probabilities():
    log_probs = torch.tensor([0.05, 0.6, 0.0, 0.35], dtype=torch.float64).log().expand(40_000, 4)
    share = drawn(log_probs, 0).bincount(minlength=4) / 40_000
    torch.testing.assert_close(share, torch.tensor([0.05, 0.6, 0.0, 0.35]), rtol=0, atol=0.01)
    assert float(share[2]) == 0
