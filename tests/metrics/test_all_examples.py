"""What holds for every metric of the registry, those that need all examples at once above all."""

import math

import pytest
import torch

from bmoe_lightning.metrics import METRICS
from bmoe_lightning.metrics.base import OverAllExamples
from bmoe_lightning.metrics.binning import Binning
from bmoe_lightning.metrics.bootstrap import draw_resamples

BINNING = Binning(7, "left")
METRIC = pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
STORING = [metric for metric in METRICS if isinstance(metric.torchmetric(BINNING), OverAllExamples)]
STORED = pytest.mark.parametrize("metric", STORING, ids=lambda metric: metric.name)


def tied(predictions, number=70, classes=4, seed=0):
    """Over-confident predictions with many equal rows, absent classes, and one column that no example has."""
    log_probs, target = predictions(number, classes, seed)
    log_probs[::3, -1] = -torch.inf
    target[::3] = target[::3].clamp(max=classes - 2)
    log_probs = log_probs.log_softmax(1)
    log_probs[number // 2 :] = log_probs[: number - number // 2].clone()
    target[number // 2 :] = torch.where(
        log_probs[number // 2 :, -1].isinf(), target[number // 2 :] % (classes - 1), target[number // 2 :]
    )
    return torch.nn.functional.pad(log_probs, (0, 1), value=-torch.inf), target


def value(metric, log_probs, target):
    return float(metric.value(log_probs, target, BINNING))


@METRIC
def test_order_and_batches_do_not_matter(metric, predictions):
    log_probs, target = tied(predictions)
    expected = value(metric, log_probs, target)
    assert not math.isnan(expected)
    order = torch.randperm(70, generator=torch.Generator().manual_seed(5))
    if metric.name in FOLDED:
        order = torch.arange(70)
    assert value(metric, log_probs[order], target[order]) == pytest.approx(expected, abs=1e-12)
    twin = metric.torchmetric(BINNING)
    for part in (slice(0, 1), slice(1, 33), slice(33, 70)):
        on_batch = twin(log_probs[order[part]], target[order[part]])
        direct = value(metric, log_probs[order[part]], target[order[part]])
        assert float(on_batch) == pytest.approx(direct, abs=1e-12, nan_ok=True)
    assert float(twin.compute()) == pytest.approx(expected, abs=1e-12)


@METRIC
def test_values_on_resamples_are_those_of_the_drawn_examples(metric, predictions):
    log_probs, target = tied(predictions, 40)
    [drawn] = draw_resamples(40, 12, 3)
    found = metric.resampled(log_probs, target, BINNING)(drawn)
    assert found.shape == (12,)
    assert found.dtype == torch.float64
    if metric.name in CROSS_FITTED:
        # Copies of an example are left out or in a fold together, so a resample is not the data set of its rows.
        return
    for s, row in enumerate(drawn.indices):
        assert float(found[s]) == pytest.approx(value(metric, log_probs[row], target[row]), abs=1e-6, nan_ok=True)


# Two folds by position: other orders have other folds.
FOLDED = {"set_size_lac", "set_coverage_lac", "set_size_aps", "set_coverage_aps"}
CROSS_FITTED = {"nll_refinement", "nll_calibration", *FOLDED}


@METRIC
def test_a_class_that_no_example_has_changes_nothing(metric, predictions):
    log_probs, target = tied(predictions)
    assert value(metric, log_probs[:, :-1], target) == pytest.approx(value(metric, log_probs, target), abs=1e-12)


@METRIC
@pytest.mark.parametrize("case", ["one example", "all right", "all wrong", "all equal", "two classes"])
def test_edge_cases_lie_in_the_range_or_are_undefined(metric, case, predictions):
    log_probs, target = predictions(30)
    if case == "one example":
        log_probs, target = log_probs[:1], target[:1]
    elif case == "all right":
        target = log_probs.argmax(1)
    elif case == "all wrong":
        target = log_probs.argmin(1)
    elif case == "all equal":
        log_probs = torch.full((30, 4), -math.log(4), dtype=torch.float64)
    else:
        log_probs, target = predictions(30, classes=2)
    found = value(metric, log_probs, target)
    assert metric.lower <= found <= metric.upper or (math.isnan(found) and metric.name in UNDEFINED)
    resampled = metric.resampled(log_probs, target, BINNING)
    for drawn in draw_resamples(len(target), 50, 0):
        samples = resampled(drawn)
        assert bool(((samples >= metric.lower) & (samples <= metric.upper) | samples.isnan()).all())
        assert metric.name in UNDEFINED or not bool(samples.isnan().any())


UNDEFINED = {"error_auroc", "error_aupr", "error_fpr95"}


@METRIC
def test_names_titles_and_definitions(metric):
    assert [other.name for other in METRICS].count(metric.name) == 1
    assert [other.title for other in METRICS].count(metric.title) == 1
    assert metric.definition
    assert not metric.definition.endswith(".")
    assert metric.higher_is_better == metric.torchmetric(BINNING).higher_is_better


@STORED
def test_batches_of_different_widths_are_refused(metric, predictions):
    twin = metric.torchmetric(BINNING)
    twin.update(*predictions(10, 4))
    twin.update(*predictions(10, 3))
    with pytest.raises(ValueError, match="columns of -inf"):
        twin.compute()


@STORED
def test_before_an_update_there_is_no_value(metric):
    with pytest.warns(UserWarning, match="before the ``update`` method"):
        assert torch.isnan(metric.torchmetric(BINNING).compute())


@STORED
def test_logits_are_refused_and_gradients_are_not_stored(metric, predictions):
    twin = metric.torchmetric(BINNING)
    with pytest.raises(ValueError, match="log_softmax"):
        twin.update(torch.randn(5, 3), torch.zeros(5, dtype=torch.long))
    log_probs, target = predictions(10)
    twin.update(log_probs.requires_grad_(), target)
    assert not any(
        state.requires_grad for name, of in twin._defaults.items() if of == [] for state in getattr(twin, name)
    )


@STORED
def test_a_module_moved_to_bfloat16_does_not_cost_precision(metric, predictions):
    log_probs, target = predictions(60)
    module = torch.nn.Module()
    module.metric = metric.torchmetric(BINNING)
    module.to(torch.bfloat16)
    module.metric.update(log_probs[:20], target[:20])
    module.metric.update(log_probs[20:], target[20:])
    assert float(module.metric.compute()) == pytest.approx(value(metric, log_probs, target), abs=1e-12)


def test_ranks_with_few_or_no_examples_have_the_value_of_all(tmp_path, predictions):
    """Two processes that exchange states: 50 and 20 examples, then 70 and none."""
    log_probs, target = tied(predictions)
    torch.save((log_probs, target), tmp_path / "predictions.pt")
    torch.multiprocessing.spawn(on_a_rank, (str(tmp_path),), nprocs=2)
    expected = [value(metric, log_probs, target) for metric in METRICS]
    for rank in range(2):
        for found in torch.load(tmp_path / f"{rank}.pt"):
            assert found == pytest.approx(expected, abs=1e-12)


def on_a_rank(rank, folder):
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(f"{folder}/store", 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    log_probs, target = torch.load(f"{folder}/predictions.pt")
    values = []
    for share in (50, 70):
        part = slice(0, share) if rank == 0 else slice(share, None)
        twins = [metric.torchmetric(BINNING) for metric in METRICS]
        if len(target[part]):
            for twin in twins:
                twin.update(log_probs[part], target[part])
        values.append([float(twin.compute()) for twin in twins])
    torch.save(values, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()
