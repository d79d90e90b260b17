"""What the exact and the compact cache have in common."""

from dataclasses import replace

import pytest
import torch

from bmoe_lightning.laplace.compact_cache import CompactCache
from bmoe_lightning.laplace.validation_cache import ValidationCache


def exact(num_examples=2):
    shape = (num_examples, 1, 1, 2, 2)
    zeros = torch.zeros(shape, dtype=torch.float64)
    return ValidationCache(
        logits=torch.zeros(num_examples, 3, dtype=torch.float64),
        labels=torch.zeros(num_examples, dtype=torch.int64),
        embedding=torch.zeros(num_examples, 3, 2, dtype=torch.float64),
        prior=zeros[:, :, 0],
        binned=zeros,
        centres=torch.ones(1, 1, dtype=torch.float64),
    )


def compact(num_examples=2):
    cache = exact(num_examples)
    return CompactCache(
        logits=cache.logits,
        labels=cache.labels,
        directions=torch.zeros(num_examples, 3, 1, dtype=torch.float64),
        diagonal=torch.zeros(num_examples, 3, dtype=torch.float64),
        binned=torch.zeros(num_examples, 2, 2),
        nodes=torch.ones(1, 1, dtype=torch.float64),
        everything=(torch.zeros(5, 3), None),
    )


@pytest.mark.parametrize("make", [exact, compact])
class TestEveryCache:
    def test_size_and_finiteness_are_those_of_the_terms(self, make):
        cache = make()
        assert cache.num_layers == 1
        assert cache.nbytes == sum(values.numel() * values.element_size() for values in cache.terms)
        assert cache.is_finite
        names = [name for name, value in vars(cache).items() if any(value is terms for terms in cache.terms)]
        assert len(names) == len(cache.terms) == 3
        for name in names:
            damaged = getattr(cache, name).clone()
            damaged.view(-1)[-1] = torch.inf
            assert not replace(cache, **{name: damaged}).is_finite, name

    def test_labels_are_checked(self, make):
        cache = make()
        assert torch.equal(cache.labelled()[1], cache.labels)
        with pytest.raises(ValueError, match=r"held-out labels are needed.*return \(logits, labels\)"):
            replace(cache, labels=None).labelled()
        with pytest.raises(ValueError, match="class"):
            replace(cache, labels=torch.tensor([0, 3])).labelled()


def test_examples_without_terms_are_those_of_a_compact_cache_alone():
    assert exact().all_examples()[0].shape == (2, 3)
    assert compact().all_examples()[0].shape == (5, 3)
