"""Covariance terms of a validation set."""

import threading
from dataclasses import replace

import pytest
import torch
from validation_sets import PRECISIONS, at, compact, set_of

from bmoe_lightning.laplace import compact_cache, validation_cache
from bmoe_lightning.laplace.compact_cache import CompactCache
from bmoe_lightning.laplace.covariance import BatchTerms
from bmoe_lightning.laplace.predictive import class_probabilities, mean_variance, standard_normal
from bmoe_lightning.laplace.prior import fit_lpo
from bmoe_lightning.laplace.slot_terms import LayerTerms
from bmoe_lightning.laplace.validation_cache import CacheBuilder, ValidationCache, cache_terms
from bmoe_lightning.utils.fit_warnings import collected_fit_warnings


def test_bins_keep_the_sum_of_products():
    """Whatever the bins do to shrinkage, their total is `sum R_i R_j` exactly."""
    projections = torch.randn(7, 3, 2, 4, dtype=torch.float64)
    examples, experts = torch.tensor([0, 0, 1, 1, 1, 2, 3]), torch.randint(3, (7,))
    curvature = torch.rand(3, 2, 4, dtype=torch.float64) ** 8
    curvature[1, 0, 0] = 0
    layer = LayerTerms(torch.zeros(4, 3, 3, dtype=torch.float64), projections, examples, experts)
    logits = torch.zeros(4, 4, dtype=torch.float64)
    embedding = torch.zeros(4, 4, 3, dtype=torch.float64)
    cache = cache_terms([BatchTerms(logits, torch.zeros(4, dtype=torch.int64), embedding, (layer,))], [curvature])
    flat = projections.flatten(2)
    expected = torch.zeros(4, 3, 3, dtype=torch.float64).index_add_(0, examples, flat @ flat.mT)
    torch.testing.assert_close(cache.binned[:, 0].sum(1), expected)
    assert bool((cache.centres[0].diff() > 0).all())
    assert float(cache.centres[0, -1]) == pytest.approx(float(curvature.max()))


@pytest.mark.parametrize("values", PRECISIONS)
def test_compact_terms_of_few_classes_lose_the_bins_only(values):
    batches, curvature, dense = set_of(40, 5)
    found = compact(batches, curvature).covariance(at(values))
    expected = dense(at(values))
    error = (found - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)
    assert float(error.max()) < 2e-3


@pytest.mark.parametrize("values", PRECISIONS)
def test_compact_terms_of_many_classes_keep_the_variance(values):
    """The mean variance, hence the evidence temperature and the probit link, to the error of the interpolation."""
    batches, curvature, dense = set_of(24, 20)
    cache = compact(batches, curvature)
    found, expected = cache.covariance(at(values)), dense(at(values))
    torch.testing.assert_close(
        mean_variance(cache.logits, found), mean_variance(cache.logits, expected), rtol=5e-3, atol=0
    )
    assert float(torch.linalg.eigvalsh(found).min()) > -1e-6 * float(found.abs().max())
    absent = cache.logits == -torch.inf
    assert not found[absent].any()
    torch.testing.assert_close(found.sum(2), torch.zeros_like(cache.logits), rtol=0, atol=1e-8 * float(found.max()))


@pytest.mark.parametrize("values", PRECISIONS)
def test_compact_terms_keep_the_predictions(values):
    """In the mean over sets: the NLL of 40 examples under a wide posterior moves by .05, and by .02 with the noise."""
    differences = []
    for seed in range(5):
        batches, curvature, dense = set_of(40, 20, seed=seed)
        cache = compact(batches, curvature)
        labels = torch.cat([batch.labels for batch in batches]).unsqueeze(1)
        exact = class_probabilities(cache.logits, dense(at(values)), num_samples=5000)
        expected = float(-exact.gather(1, labels).mean())
        found = class_probabilities(cache.logits, cache.covariance(at(values)), num_samples=5000)
        of_objective = float(cache.nll(at(values), standard_pairs(cache, 5000, 0), labels.squeeze(1)))
        differences.append((float(-found.gather(1, labels).mean()) - expected, of_objective - expected))
    for of_kind in zip(*differences, strict=True):
        assert abs(sum(of_kind)) / 5 < 0.03
        assert max(map(abs, of_kind)) < 0.1


def test_compact_terms_from_exact_ones_are_those_from_projections():
    """A set that outgrows the memory half way."""
    batches, curvature, _ = set_of(40, 8)
    # 33 KiB for each example and contrast squared, within a 32nd of the memory for two batches.
    late = cache_terms(batches, curvature, max_bytes=50 << 20)
    assert isinstance(late, CompactCache)
    builder = CacheBuilder(curvature, max_bytes=50 << 20)
    builder.add(batches[0])
    assert len(builder._exact) == 1
    early = compact(batches, curvature)
    for values in PRECISIONS:
        one, other = late.covariance(at(values)), early.covariance(at(values))
        error = (one - other).flatten(1).norm(dim=1) / other.flatten(1).norm(dim=1)
        assert float(error.max()) < 2e-3
    assert torch.equal(late.logits, early.logits)
    assert torch.equal(late.labels, early.labels)


def test_lpo_of_compact_terms_is_near_that_of_exact_ones():
    batches, curvature, _ = set_of(48, 12)
    exact = cache_terms(batches, curvature, max_bytes=1 << 34)
    assert isinstance(exact, ValidationCache)
    cache = compact(batches, curvature)
    assert cache.nbytes < exact.nbytes / 20
    labels = exact.labels
    noise = exact.noise(1000, 5)
    for scope in ("global", "layer"):
        at_exact = fit_lpo(exact, scope, num_samples=100, max_iterations=15)
        at_compact = fit_lpo(cache, scope, num_samples=200, max_iterations=15)
        assert float(exact.nll(at_compact, noise, labels)) < float(exact.nll(at_exact, noise, labels)) + 5e-3


@pytest.mark.parametrize("num_classes", [5, 20])
def test_the_memory_is_kept_for_any_number_of_examples(num_classes):
    batches, curvature, _ = set_of(400, num_classes)
    limit = 300_000
    with collected_fit_warnings() as warned:
        found = compact(batches, curvature, max_bytes=limit)
    (sentence,) = warned
    assert f"so {len(found.labels)} drawn ones of them were used" in sentence
    assert found.binned.nbytes <= limit
    assert 20 < len(found.logits) < 400
    # What remains is a subset in order, and the labels belong to it.
    all_logits, all_labels = found.all_examples()
    assert len(all_logits) == len(all_labels) == 400
    position = [int((all_logits == row).all(1).nonzero()) for row in found.logits]
    assert position == sorted(position) == found.positions().tolist()
    assert torch.equal(all_labels[position], found.labels)
    assert bool(fit_lpo(found, "global", num_samples=20).isfinite().all())


def test_few_classes_that_fit_stay_exact():
    batches, curvature, dense = set_of(24, 6)
    found = cache_terms(batches, curvature)
    assert isinstance(found, ValidationCache)
    expected = dense(at(PRECISIONS[1]))
    assert float((found.covariance(at(PRECISIONS[1])) - expected).abs().max()) < 1e-2 * float(expected.abs().max())


def test_chunks_of_groups_change_no_bit(monkeypatch):
    batches, curvature, _ = set_of(24, 5)
    whole = cache_terms(batches, curvature).binned
    monkeypatch.setattr(validation_cache, "_CHUNK_FLOATS", 1)
    assert torch.equal(cache_terms(batches, curvature).binned, whole)


@pytest.mark.parametrize("collect", [cache_terms, compact], ids=["exact", "compact"])
def test_chunks_of_examples_change_neither_value_nor_gradient(monkeypatch, collect):
    batches, curvature, _ = set_of(24, 5 if collect is cache_terms else 12)
    cache = collect(batches, curvature)
    noise = cache.noise(50, 0)

    def value_and_gradient():
        variable = at((0.3, 2.0)).requires_grad_()
        value = cache.nll(variable, noise, cache.labels)
        return float(value), torch.autograd.grad(value, variable)[0]

    value, gradient = value_and_gradient()
    monkeypatch.setattr(compact_cache, "_SAMPLED_FLOATS", 50 * 12 * 5)
    monkeypatch.setattr(validation_cache, "_SAMPLED_FLOATS", 50 * 5 * 5)
    chunked, of_chunks = value_and_gradient()
    assert chunked == pytest.approx(value, rel=1e-6)
    torch.testing.assert_close(of_chunks, gradient, rtol=1e-4, atol=1e-8)
    step = 1e-3
    for position in (0, 1):
        moved = at((0.3, 2.0))
        moved[position] += step
        low = at((0.3, 2.0))
        low[position] -= step
        slope = (cache.nll(moved, noise, cache.labels) - cache.nll(low, noise, cache.labels)) / (2 * step)
        assert float(slope) == pytest.approx(float(gradient[position]), rel=0.05, abs=1e-3)


def test_many_examples_get_fewer_samples_each():
    batches, curvature, _ = set_of(24, 12)
    cache = compact(batches, curvature)
    assert cache.noise(1000, 0).shape == (1000, 8 + 12)
    many = replace(cache, logits=torch.zeros(1000, 30, dtype=torch.float64))
    assert 100 < len(many.noise(1000, 0)) < 300
    assert len(replace(cache, logits=torch.zeros(100_000, 30)).noise(1000, 0)) == 100
    assert len(cache.noise(7, 0)) == 6


def test_few_samples_do_not_bias_the_nll():
    batches, curvature, _ = set_of(48, 12)
    cache = compact(batches, curvature)
    many = float(cache.nll(at((0.5, 0.5)), standard_pairs(cache, 20_000, 1), cache.labels))
    few = [float(cache.nll(at((0.5, 0.5)), standard_pairs(cache, 40, seed), cache.labels)) for seed in range(20)]
    assert sum(few) / len(few) == pytest.approx(many, abs=0.01)


def standard_pairs(cache, count, seed):
    half = standard_normal(count // 2, cache.directions.shape[2] + cache.logits.shape[1], seed)
    return torch.cat([half, -half])


def widened(batches, classes, num_columns):
    """The same batches with absent classes in all other columns."""
    columns, wide = torch.tensor(classes), []
    for batch in batches:
        logits = torch.full((len(batch.logits), num_columns), -torch.inf, dtype=torch.float64)
        embedding = torch.zeros(len(logits), num_columns, batch.embedding.shape[2], dtype=torch.float64)
        logits, embedding = (
            logits.index_copy(1, columns, batch.logits),
            embedding.index_copy(1, columns, batch.embedding),
        )
        wide.append(replace(batch, logits=logits, embedding=embedding, labels=columns[batch.labels]))
    return wide


@pytest.mark.parametrize("collect", [cache_terms, compact], ids=["exact", "compact"])
@pytest.mark.parametrize("classes", [(0, 1, 2, 3), (2, 3, 5, 8)], ids=["behind", "between"])
def test_absent_columns_change_neither_objective_nor_precision(collect, classes):
    batches, curvature, _ = set_of(32, 4)
    alone, among = collect(batches, curvature), collect(widened(batches, classes, 10), curvature)
    assert type(alone) is type(among)
    for values in PRECISIONS:
        found = [float(cache.nll(at(values), cache.noise(200, 3), cache.labels)) for cache in (alone, among)]
        assert found[1] == pytest.approx(found[0], rel=1e-7)
    found = [fit_lpo(cache, num_samples=100) for cache in (alone, among)]
    torch.testing.assert_close(found[1], found[0], rtol=1e-6, atol=0)


def test_contrasts_of_absent_classes_are_not_stored():
    """Four classes in ten columns are few, and those of another batch beside them change no bit."""
    batches, curvature, _ = set_of(32, 4)
    few, many = widened(batches, (0, 4, 5, 9), 10), set_of(8, 6, seed=3)[0]
    padded = []
    for batch in few:  # nine contrasts, as of ten columns without a look at the classes
        layers = [
            replace(
                layer,
                prior=torch.nn.functional.pad(layer.prior, (0, 6, 0, 6)),
                projections=torch.nn.functional.pad(layer.projections, (0, 0, 0, 0, 0, 6)),
            )
            for layer in batch.layers
        ]
        embedding = torch.nn.functional.pad(batch.embedding, (0, 6))
        padded.append(replace(batch, embedding=embedding, layers=tuple(layers)))
    alone, found = cache_terms(batches, curvature), cache_terms(padded, curvature)
    assert isinstance(found, ValidationCache)
    assert torch.equal(found.binned, alone.binned)
    assert torch.equal(found.prior, alone.prior)
    joined = cache_terms([*padded, *many], curvature)
    assert joined.binned.shape[-1] == 5
    precision = at((0.5, 20.0))
    expected = alone.nll(precision, alone.noise(100, 0), alone.labels)
    kept = replace(
        joined,
        **{name: getattr(joined, name)[:32] for name in ("logits", "labels", "embedding", "prior", "binned")},
    )
    assert float(kept.nll(precision, joined.noise(100, 0), kept.labels)) == pytest.approx(float(expected), rel=1e-12)


def test_batches_of_different_numbers_of_classes():
    few, curvature, _ = set_of(16, 4)
    many, _, _ = set_of(16, 12, seed=0)
    found = compact([*few, *many], curvature)
    assert found.logits.shape == (32, 12)
    assert bool((found.logits[:16, 4:] == -torch.inf).all())
    alone = compact(few, curvature)
    for values in PRECISIONS:
        among, expected = found.covariance(at(values))[:16], alone.covariance(at(values))
        assert not among[:, 4:].any()
        torch.testing.assert_close(among[:, :4, :4], expected, rtol=1e-3, atol=1e-4 * float(expected.max()))


def test_no_curvature_at_all():
    batches, _, _ = set_of(16, 12)
    none = [torch.empty(3, 0, 0, dtype=torch.float64)] * 2
    flat = [
        replace(batch, layers=tuple(replace(x, projections=x.projections[:, :, :0, :0]) for x in batch.layers))
        for batch in batches
    ]
    found = compact(flat, none)
    first = found.covariance(at((1.0, 1.0)))
    torch.testing.assert_close(found.covariance(at((4.0, 4.0))), first / 4, rtol=1e-4, atol=1e-6)


def test_without_labels():
    batches, curvature, _ = set_of(16, 12)
    found = compact([replace(batch, labels=None) for batch in batches], curvature)
    assert found.labels is None
    assert found.all_examples()[1] is None
    with pytest.raises(ValueError, match="held-out labels are needed"):
        fit_lpo(found)


def test_a_memory_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least 1 byte"):
        CacheBuilder([], max_bytes=0)


class Ranks:
    """Two threads that stand for two ranks, and the collectives between them."""

    def __init__(self, monkeypatch):
        self.barrier, self.local, self.slots = threading.Barrier(2), threading.local(), [None, None]
        monkeypatch.setattr(validation_cache, "gather_number", self.gather)
        monkeypatch.setattr(validation_cache, "gather_examples", self.gather_examples)

    def gather(self, value):
        self.slots[self.local.rank] = value
        self.barrier.wait()
        found = list(self.slots)
        self.barrier.wait()
        return found

    def gather_examples(self, values):
        first, second = self.gather(values)
        assert len(first) - len(second) in (0, 1)
        assert first.dtype == second.dtype
        joined = first.new_zeros(len(first) + len(second), *first.shape[1:])
        joined[::2] = first
        if len(second):
            joined[1::2] = second
        return joined

    def run(self, functions):
        results = [None, None]

        def run(rank):
            self.local.rank = rank
            results[rank] = functions[rank]()

        threads = [threading.Thread(target=run, args=(rank,)) for rank in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        return results


def shard_of(batch, rank):
    kept = torch.arange(rank, len(batch.logits), 2)
    layers = []
    for layer in batch.layers:
        here = torch.isin(layer.examples, kept)
        position = torch.searchsorted(kept, layer.examples[here])
        layers.append(LayerTerms(layer.prior[kept], layer.projections[here], position, layer.experts[here]))
    return BatchTerms(batch.logits[kept], batch.labels[kept], batch.embedding[kept], tuple(layers))


@pytest.mark.parametrize(("num_examples", "limit"), [(40, 1 << 30), (33, 1 << 30), (40, 200_000), (1, 1 << 30)])
def test_ranks_have_the_terms_of_one_process(monkeypatch, num_examples, limit):
    """Also where one rank is still exact, or has no example at all."""
    batches, curvature, _ = set_of(num_examples, 12)
    alone = compact(batches, curvature)
    ranks = Ranks(monkeypatch)

    def collect(rank):
        builder = CacheBuilder(curvature, max_bytes=limit, num_shards=2)
        if rank == 0:
            builder._make_compact()
        for batch in batches:
            part = shard_of(batch, rank)
            if len(part.logits):
                builder.add(part)
        return builder.finish(distributed=True)

    one, other = ranks.run([lambda: collect(0), lambda: collect(1)])
    assert torch.equal(one.binned, other.binned)
    assert torch.equal(one.all_examples()[0], alone.logits)
    assert torch.equal(one.all_examples()[1], alone.labels)
    assert torch.equal(one.all_examples()[0][one.positions()], one.logits)
    if limit == 1 << 30:
        assert torch.equal(one.logits, alone.logits)
        for values in PRECISIONS:
            expected = alone.covariance(at(values))
            error = (one.covariance(at(values)) - expected).abs().max() / expected.abs().max()
            assert float(error) < 1e-3
    else:
        assert 4 < len(one.logits) < num_examples
        assert one.binned.nbytes <= limit
