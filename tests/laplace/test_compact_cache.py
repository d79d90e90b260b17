"""The parts of the compact covariance terms, each against a dense float64 computation."""

from __future__ import annotations

import pytest
import torch

from bmoe_lightning.laplace import compact_cache
from bmoe_lightning.laplace.compact_cache import CompactCache, Nodes, cholesky, compact_products, compact_terms
from bmoe_lightning.laplace.covariance import BatchTerms
from bmoe_lightning.laplace.slot_terms import LayerTerms


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def centred_embedding(num_examples, num_classes):
    """Contrasts of each class with the last one, centred: `[N, K, K - 1]`."""
    full = torch.eye(num_classes, dtype=torch.float64)[:, :-1]
    return (full - full.mean(0)).expand(num_examples, -1, -1).contiguous()


class TestNodes:
    CURVATURE = 10 ** (8 * torch.rand(3, 2, 5, generator=torch.Generator().manual_seed(0)).double() - 5)

    def test_the_weights_of_an_eigenvalue_sum_to_one(self):
        weights = Nodes([self.CURVATURE]).weights(0)
        assert weights.shape[:2] == (3, 10)
        torch.testing.assert_close(weights.sum(-1), torch.ones(3, 10), rtol=0, atol=2e-6)
        assert int((weights != 0).sum(-1).max()) <= 6

    @pytest.mark.parametrize("precision", [1e-6, 1e-3, 1.0, 30.0, 1e5])
    def test_a_shrunk_term_is_interpolated(self, precision):
        """`1 / (lambda + s)`, from its values at the nodes."""
        nodes = Nodes([self.CURVATURE])
        found = nodes.weights(0).double() @ (1 / (precision + nodes.values[0]))
        s = self.CURVATURE.flatten(1)
        error = (found * (precision + s) - 1).abs()
        # The remainder h^6 / 6! prod |x - x_i| of exp(-x), h = .75: 8.7e-4 between the middle two of six nodes, and
        # 4.2e-3 between the first two, which is where s lies at the ends; half as much again, as the sixth derivative
        # varies within the nodes.
        inner = (s > nodes.values[0, 2]) & (s < nodes.values[0, -3])
        assert int(inner.sum()) > 10
        assert float(error[inner].max()) < 1.5 * 8.7e-4
        assert float(error.max()) < 1.5 * 4.2e-3

    def test_an_eigenvalue_at_a_node_is_that_node(self):
        nodes = Nodes([self.CURVATURE])
        weights = nodes.weights(0, nodes.values[0])
        torch.testing.assert_close(weights, torch.eye(len(nodes.values[0])), rtol=0, atol=1e-5)

    def test_three_nodes_on_each_side_share_it(self):
        nodes = Nodes([self.CURVATURE])
        between = (nodes.values[0, 7] * nodes.values[0, 8]).sqrt()
        weights = nodes.weights(0, between.unsqueeze(0))[0]
        assert weights.nonzero().flatten().tolist() == [5, 6, 7, 8, 9, 10]
        torch.testing.assert_close(weights[5:11], weights[5:11].flip(0), rtol=0, atol=1e-6)

    def test_no_shrinkage_has_no_weight(self):
        curvature = self.CURVATURE.clone()
        curvature[1, 0, 2], curvature[2] = 0, 0
        weights = Nodes([curvature]).weights(0).view(3, 2, 5, -1)
        assert not weights[1, 0, 2].any()
        assert not weights[2].any()
        assert weights[1, 0, 1].any()

    def test_layers_have_nodes_of_their_own_and_equally_many(self):
        values = Nodes([self.CURVATURE, self.CURVATURE[:, :1] * 1e6, torch.zeros(3, 2, 5)]).values
        assert values.shape[0] == 3
        assert bool((values.diff(dim=1) > 0).all())
        assert float(values[1, -1] / self.CURVATURE[:, :1].max()) == pytest.approx(1e6)

    def test_without_any_curvature_there_are_none(self):
        nodes = Nodes([torch.empty(3, 0, 0)])
        assert nodes.values.shape == (1, 0)
        assert nodes.weights(0, torch.ones(4)).shape == (4, 0)


def one_layer(num_examples, num_classes, curvature, seed=0):
    """Terms of one layer with two slots an example, and what no eigenvalue shrinks beside them."""
    contrasts = num_classes - 1
    examples = torch.arange(num_examples).repeat_interleave(2)
    experts = torch.randint(len(curvature), (2 * num_examples,), generator=torch.Generator().manual_seed(seed))
    projections = normal(2 * num_examples, contrasts, *curvature.shape[1:], seed=seed)
    flat = projections.flatten(2)
    rest = normal(num_examples, contrasts, contrasts, seed=seed + 1)
    prior = (rest @ rest.mT).index_add(0, examples, flat @ flat.mT)
    return LayerTerms(prior, projections, examples, experts)


def dense_covariance(layer, curvature, embedding, precision):
    """`(<G_i, G_j> - sum s / (lambda + s) R_i R_j) / lambda`, of the logits."""
    flat = layer.projections.flatten(2)
    shrinkage = (curvature / (precision + curvature)).flatten(1)[layer.experts]
    explained = torch.zeros_like(layer.prior)
    explained.index_add_(0, layer.examples, (flat * shrinkage.unsqueeze(1)) @ flat.mT)
    return embedding @ ((layer.prior - explained) / precision) @ embedding.mT


def cache_of(terms, curvature):
    nodes = Nodes([curvature])
    found = compact_terms(terms, [nodes.weights(0)])
    pieces, labels = found.pop("pieces"), terms.labels
    return CompactCache(
        terms.logits, labels, **found, binned=pieces, nodes=nodes.values, everything=(terms.logits, labels)
    )


class TestTerms:
    CURVATURE = (normal(3, 2, 4, seed=5) * 2).exp()

    def batch(self, num_classes, num_examples=6):
        layer = one_layer(num_examples, num_classes, self.CURVATURE)
        logits = 2 * normal(num_examples, num_classes, seed=3)
        labels = torch.arange(num_examples) % num_classes
        return BatchTerms(logits, labels, centred_embedding(num_examples, num_classes), (layer,)), layer

    @pytest.mark.parametrize("precision", [0.02, 1.0, 50.0])
    @pytest.mark.parametrize("num_classes", [3, 8])
    def test_with_enough_directions_the_covariance_is_exact(self, num_classes, precision):
        terms, layer = self.batch(num_classes)
        found = cache_of(terms, self.CURVATURE).covariance(torch.tensor([precision], dtype=torch.float64))
        expected = dense_covariance(layer, self.CURVATURE, terms.embedding, precision)
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-3 * float(expected.abs().max()))

    def test_with_more_classes_the_trace_is(self):
        terms, layer = self.batch(20)
        found = cache_of(terms, self.CURVATURE).covariance(torch.tensor([1.0], dtype=torch.float64))
        expected = dense_covariance(layer, self.CURVATURE, terms.embedding, 1.0)
        traces = (values.diagonal(dim1=1, dim2=2).sum(1) for values in (found, expected))
        torch.testing.assert_close(*traces, rtol=2e-3, atol=0)

    def test_chunks_of_slots_change_nothing(self, monkeypatch):
        terms, _ = self.batch(8)
        whole = compact_terms(terms, [Nodes([self.CURVATURE]).weights(0)])
        monkeypatch.setattr(compact_cache, "_CHUNK_FLOATS", 1)
        chunked = compact_terms(terms, [Nodes([self.CURVATURE]).weights(0)])
        torch.testing.assert_close(chunked["pieces"], whole["pieces"], rtol=1e-5, atol=1e-6)

    def test_from_products_at_the_nodes_they_are_the_same(self):
        """Exact terms whose bins are the nodes: each bin's products of projections."""
        terms, layer = self.batch(6)
        nodes = Nodes([self.CURVATURE])
        weights = nodes.weights(0).double()[layer.experts]  # [slots, r_g r_a, nodes]
        flat = layer.projections.flatten(2)
        products = torch.einsum("sim,sjm,smb->sbij", flat, flat, weights)
        binned = torch.zeros(6, nodes.values.shape[1], 5, 5, dtype=torch.float64)
        binned.index_add_(0, layer.examples, products)
        unit = torch.eye(nodes.values.shape[1], dtype=torch.float64).unsqueeze(0)
        found = compact_products(terms.logits, terms.embedding, layer.prior.unsqueeze(1), binned.unsqueeze(1), unit)
        expected = compact_terms(terms, [nodes.weights(0)])
        for name, value in expected.items():
            scale = float(value.abs().max())
            torch.testing.assert_close(found[name], value, rtol=0, atol=1e-5 * scale, msg=name)


class TestObjective:
    def test_is_the_mean_of_the_sampled_softmax(self):
        """Against the definition, with the correction for few samples left out by many of them."""
        curvature = TestTerms.CURVATURE
        terms, layer = TestTerms().batch(4, num_examples=5)
        cache = cache_of(terms, curvature)
        noise = torch.cat([half := normal(20_000, cache.directions.shape[2] + 4, seed=9), -half])
        found = float(cache.nll(torch.tensor([2.0], dtype=torch.float64), noise, terms.labels))
        covariance = dense_covariance(layer, curvature, terms.embedding, 2.0)
        values, vectors = torch.linalg.eigh(covariance)
        root = vectors * values.clamp(min=0).sqrt().unsqueeze(1)
        samples = terms.logits.unsqueeze(2) + root @ torch.cat([half := normal(4, 20_000, seed=4), -half], dim=1)
        probability = samples.softmax(1).mean(2)
        expected = -float(probability.gather(1, terms.labels.unsqueeze(1)).log().mean())
        assert found == pytest.approx(expected, abs=0.02)

    def test_noise_is_antithetic_and_repeatable(self):
        cache = cache_of(TestTerms().batch(4)[0], TestTerms.CURVATURE)
        noise = cache.noise(100, 3)
        assert torch.equal(noise[:50], -noise[50:])
        assert torch.equal(noise, cache.noise(100, 3))
        assert not torch.equal(noise, cache.noise(100, 4))


def test_a_cholesky_factor_of_what_rounding_made_indefinite():
    good = normal(2, 3, 3)
    good = good @ good.mT + torch.eye(3, dtype=torch.float64)
    bad = good.clone()
    bad[0] = torch.diag(torch.tensor([1.0, 1e-3, -1e-9], dtype=torch.float64))
    torch.testing.assert_close(cholesky(good) @ cholesky(good).mT, good)
    root = cholesky(bad)
    assert bool(root.isfinite().all())
    torch.testing.assert_close(root @ root.mT, bad, rtol=0, atol=1e-5)
