import torch
from torch import Tensor

from bmoe_lightning.metrics.base import MeanOverExamples
from bmoe_lightning.metrics.binning import Binning
from bmoe_lightning.metrics.spec import Resamples, mean_over_examples


class Margin(MeanOverExamples):
    higher_is_better = True
    prefix = "margin"

    margin_sum: Tensor
    margin_count: Tensor

    @staticmethod
    def per_example(log_probs, target):
        top = log_probs.exp().topk(2, dim=1).values
        return top[:, 0] - top[:, 1]


def test_counts_of_a_resample():
    resamples = Resamples(torch.tensor([[0, 2, 2], [1, 1, 1]]))
    assert resamples.counts.tolist() == [[1, 0, 2], [0, 3, 0]]
    assert resamples.counts is resamples.counts


def test_a_mean_over_examples_is_described_by_its_class(predictions):
    log_probs, target = predictions(20)
    metric = mean_over_examples(
        "margin", "Margin", Margin, definition="the margin", upper=1.0, note="Margin of the top two."
    )
    assert metric.header == "Margin ↑"
    assert metric.note(Binning()) == "Margin of the top two."
    twin = metric.torchmetric(Binning())
    twin.update(log_probs, target)
    assert metric.value(log_probs, target, Binning()) == twin.compute()
    indices = torch.tensor([[3] * 20, list(range(20))])
    values = metric.resampled(log_probs, target, Binning())(Resamples(indices))
    torch.testing.assert_close(values, Margin.per_example(log_probs, target)[indices].mean(1))


class Inverse(Margin):
    @staticmethod
    def per_example(log_probs, target):
        return 1 / log_probs.exp().min(dim=1).values


def test_an_infinite_value_that_is_not_drawn_does_not_count():
    log_probs = torch.tensor([[0.0, -torch.inf], [-0.6931471805599453] * 2], dtype=torch.float64)
    metric = mean_over_examples("inverse", "Inverse", Inverse, definition="", upper=torch.inf)
    values = metric.resampled(log_probs, torch.tensor([0, 0]), Binning())(Resamples(torch.tensor([[1, 1], [0, 1]])))
    assert values.tolist() == [2.0, torch.inf]


class Target(Margin):
    higher_is_better = None


def test_a_metric_without_an_order_has_no_arrow():
    metric = mean_over_examples("target", "Target", Target, definition="", upper=1.0)
    assert metric.higher_is_better is None
    assert metric.header == "Target"
