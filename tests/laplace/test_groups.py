import numpy as np
import pytest
import torch
from oracles.models import answer_logits, toy_batch, toy_model
from oracles.waits import Waits

from bmoe_lightning.curvature import collect_factors
from bmoe_lightning.experts.taps import Slots
from bmoe_lightning.laplace import LaplacePosterior, groups
from bmoe_lightning.laplace.groups import SlotGroups, SlotKeys, group_slots, inner_products, padded_groups

CPU = torch.device("cpu")


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 6, 7, 12, 13, 100])
def test_padded_groups_hold_every_slot_once(size):
    sizes = np.array([size, 1, 9, size])
    seen = torch.zeros(int(sizes.sum()), dtype=torch.int64)
    found = []
    for chosen, rows, filled in padded_groups(SlotGroups(seen, np.arange(4), sizes, 0), 10, (3, 5), CPU):
        assert filled.sum(1).tolist() == sizes[chosen.numpy()].tolist()
        assert rows.shape[1] <= max(2 * int(sizes[chosen.numpy()].max()) - 1, 1)
        assert int(rows.max()) < len(seen)
        seen.index_add_(0, rows[filled], torch.ones_like(rows[filled]))
        found += chosen.tolist()
    assert bool((seen == 1).all())
    assert sorted(found) == [0, 1, 2, 3]


@pytest.mark.parametrize(("d_in", "heights"), [(1, [64]), (3000, [16, 64]), (10**6, [1, 3, 8, 16, 64])])
def test_groups_are_padded_further_where_that_takes_few_slots(d_in, heights):
    sizes = np.array([1, 3, 7, 14, 61])
    order = torch.zeros(int(sizes.sum()), dtype=torch.int64)
    found = [
        rows.shape[1] for _, rows, _ in padded_groups(SlotGroups(order, np.arange(5), sizes, 0), d_in, (1, 1), CPU)
    ]
    assert found == heights


def drawn(num_groups, height, d_in, d_out, num_contrasts):
    generator = torch.Generator().manual_seed(height)
    a = torch.randn(num_groups, height, d_in, generator=generator, dtype=torch.float64)
    g = torch.randn(num_contrasts, num_groups, height, d_out, generator=generator, dtype=torch.float64)
    return a, g


@pytest.mark.parametrize("chunk", [1, 100, 1 << 24])
@pytest.mark.parametrize(("height", "way"), [(3, "_by_pairs"), (60, "_written_out")])
def test_both_ways_and_their_choice(height, way, chunk, monkeypatch):
    """Few slots are paired, many are summed into the gradient: whichever takes fewer operations."""
    a, g = drawn(4, height, 7, 5, 3)
    written = torch.einsum("pnso,nsi->npoi", g, a).flatten(2)
    expected = written @ written.mT
    monkeypatch.setattr(groups, "_CHUNK_FLOATS", chunk)
    taken = []
    for name in ("_by_pairs", "_written_out"):
        own = getattr(groups, name)
        torch.testing.assert_close(own(a, g), expected, rtol=1e-10, atol=1e-10)
        monkeypatch.setattr(groups, name, lambda a, g, own=own, name=name: taken.append(name) or own(a, g))
    torch.testing.assert_close(inner_products(a, g), expected, rtol=1e-10, atol=1e-10)
    assert taken == [way]


def test_the_way_is_chosen_by_counted_operations(monkeypatch):
    """At Qwen1.5-MoE's size the experts' groups of some tens of slots are paired, a layer over 2048 tokens is not."""
    taken = []
    for name in ("_by_pairs", "_written_out"):
        monkeypatch.setattr(groups, name, lambda *_, name=name: taken.append(name))
    with torch.device("meta"):
        for height in (17, 400, 2048):
            inner_products(torch.empty(1, height, 1408), torch.empty(3, 1, height, 2048))
    assert taken == ["_by_pairs", "_by_pairs", "_written_out"]


def test_grouping():
    slots = Slots(torch.tensor([[1.0], [0.0], [1.0], [1.0], [1.0], [1.0]]), torch.tensor([1, 1, 0, 1, 0, 1]), None)
    gradients = [torch.tensor([[0.0], [1.0], [1.0], [1.0], [0.0], [1.0]]), torch.tensor([[2.0]] + [[0.0]] * 5)]
    owners = torch.tensor([1, 1, 0, -1, 0, 1])
    # Slot 1 has no input, slot 3 no owner, slot 4 no gradient.
    keys = SlotKeys.of(slots, gradients, owners, 3, 2)
    other = SlotKeys.of(slots, gradients[:1], owners, 3, 2)
    first, second = group_slots([keys, other])
    assert first.order.tolist() == [2, 0, 5]
    assert (first.keys.tolist(), first.sizes.tolist(), first.num_orphans) == ([0, 3], [1, 2], 1)
    assert (second.order.tolist(), second.sizes.tolist()) == ([2, 5], [1, 1])


def test_waiting_for_the_device_does_not_grow_with_layers():
    counts = []
    for num_layers in (2, 6):
        model, batch = toy_model(num_layers=num_layers), toy_batch()
        posterior = LaplacePosterior(collect_factors(model, answer_logits, [batch], rank=3))
        posterior.predict(model, answer_logits, batch)
        with Waits() as waits:
            posterior.predict(model, answer_logits, batch)
        counts.append(waits.count)
    assert counts[0] == counts[1]
