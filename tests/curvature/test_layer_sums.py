import math
from dataclasses import replace

import pytest
import torch

from bmoe_lightning.curvature.layer_sums import LayerBatch, LayerSums
from bmoe_lightning.experts.taps import Slots
from bmoe_lightning.experts.types import ExpertLayer
from bmoe_lightning.utils import devices

LAYER = ExpertLayer("experts", 0, 3, 4, 5, "modules", "down_proj")


def added(inputs, gradients, experts, owners=None):
    sums = LayerSums(LAYER, inputs, rank=5, sketch="exact", seed=0)
    batch = LayerBatch(sums, Slots(inputs, experts, None), owners, num_examples=2)
    for of_pass in gradients:
        batch.add_gradients(of_pass, 0.0)
    batch.add_inputs()
    return sums


@pytest.fixture
def slots():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(7, 4, generator=generator, dtype=torch.float64)
    gradients = torch.randn(2, 7, 5, generator=generator, dtype=torch.float64)
    inputs[1] = 0  # an input that a model passes to an expert without a token
    gradients[:, 4] = 0  # a position that affects no logit
    gradients[0, 5] = 0  # one that affects the logits of the second pass alone
    return inputs, gradients, torch.tensor([2, 0, 2, 0, 0, 2, 0])


@pytest.mark.parametrize("at_once", [True, False])
def test_sums_are_those_of_slots_with_a_weight_gradient(slots, at_once, monkeypatch):
    monkeypatch.setattr(devices, "answers_at_once", lambda device: at_once)
    inputs, gradients, experts = slots
    sums = added(inputs, gradients, experts)
    a, g = torch.zeros(3, 4, 4, dtype=torch.float64), torch.zeros(3, 5, 5, dtype=torch.float64)
    for slot in (0, 2, 3, 5, 6):
        a[experts[slot]] += torch.outer(inputs[slot], inputs[slot])
        for of_pass in gradients[:, slot]:
            g[experts[slot]] += torch.outer(of_pass, of_pass)
    torch.testing.assert_close(sums.inputs.state()["gram"], a)
    torch.testing.assert_close(sums.gradients.state()["gram"], g)
    torch.testing.assert_close(sums.inputs.trace, a.diagonal(dim1=1, dim2=2).sum(1))
    torch.testing.assert_close(sums.gradients.trace, g.diagonal(dim1=1, dim2=2).sum(1))
    assert sums.slots.tolist() == [2, 0, 3]


def test_the_reduce_form_sums_gradients_and_averages_inputs_of_an_example(slots):
    inputs, gradients, experts = slots
    sums = added(inputs, gradients[1:], experts, owners=torch.tensor([0, 0, 0, 1, 1, 1, 1]))
    groups = {2: [(0, 2), (5,)], 0: [(3, 6)]}
    for expert, members in groups.items():
        a = sum(torch.outer(m, m) for m in (inputs[list(of)].mean(0) for of in members))
        g = sum(torch.outer(m, m) for m in (gradients[1, list(of)].sum(0) for of in members))
        torch.testing.assert_close(sums.inputs.state()["gram"][expert], a)
        torch.testing.assert_close(sums.gradients.state()["gram"][expert], g)
    assert sums.slots.tolist() == [1, 0, 2]


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("kind", ["a", "g"])
def test_a_value_that_is_not_finite_counts_and_is_named(slots, value, kind):
    inputs, gradients, experts = slots
    if kind == "a":
        inputs[2, 3] = value
    else:
        gradients[0, 2] = torch.tensor([0, 0, value, 0, 0])
    with pytest.raises(ValueError, match=f"{kind}-factor of layer 'experts' is not finite for expert 2: "):
        added(inputs, gradients, experts).finish(1.0)


def test_a_state_gives_the_same_factors(slots):
    sums = added(*slots)
    fresh = LayerSums(LAYER, slots[0], rank=5, sketch="exact", seed=0)
    fresh.load_state(sums.state())
    for name, tensor in sums.finish(2.0).tensors().items():
        assert torch.equal(tensor, fresh.finish(2.0).tensors()[name])
    with pytest.raises(ValueError, match="negative"):
        fresh.load_state(sums.state() | {"slots": -sums.slots})


class TestFirstTokens:
    """The query of a row's first token attends to one key: its gradient is zero, and in floating point rounding."""

    ROWS = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2])

    def counted(self, sizes, rows=ROWS, layout="linear", approximation="expand", passes=1, dtype=torch.float64):
        inputs = torch.ones(len(sizes), 4, dtype=torch.float64)
        gradients = [torch.tensor(sizes, dtype=dtype).unsqueeze(1).expand(-1, 5)] * passes
        layer = replace(LAYER, num_experts=1, layout=layout)
        sums = LayerSums(layer, inputs, rank=4, sketch="exact", seed=0)
        experts = torch.zeros(len(sizes), dtype=torch.int64)
        owners = rows if approximation == "reduce" else None
        batch = LayerBatch(sums, Slots(inputs, experts, rows), owners, num_examples=3, num_rows=3)
        for of_pass in gradients:
            batch.add_gradients(of_pass, 0.0)
        batch.add_inputs()
        return sums

    @pytest.mark.parametrize("passes", [1, 3])
    def test_of_rounding_errors_do_not_count(self, passes):
        sums = self.counted([1e-7, 1, 2, 0, 1e-6, 1, 1, 1e-9], passes=passes)
        assert sums.slots.tolist() == [5]  # without two first tokens and the padding
        assert float(sums.gradients.trace) == pytest.approx(5 * passes * (1 + 4 + 1 + 1 + 1e-18), rel=1e-9)

    def test_of_rounding_errors_do_not_count_in_float16_near_the_end_of_its_range(self):
        assert self.counted([6e-8, 5e-3, 5e-3, 0, 1, 1, 1, 1], dtype=torch.float16).slots.tolist() == [6]

    def test_of_an_example_far_surer_than_the_others_count_by_its_own_scale(self):
        assert self.counted([1e-3, 1, 2, 1e-15, 1e-14, 1e-13, 1e-20, 1e-13]).slots.tolist() == [7]

    def test_tokens_after_the_first_count_however_small(self):
        assert self.counted([1, 1e-30, 1e-12, 1, 1, 0, 1, 1]).slots.tolist() == [7]

    @pytest.mark.parametrize(("rows", "layout"), [(None, "linear"), (ROWS, "modules")])
    def test_are_unknown_for_experts_and_without_rows(self, rows, layout):
        assert self.counted([1e-7, 1, 2, 0, 1e-6, 1, 1, 1], rows, layout).slots.tolist() == [7]

    def test_in_the_reduce_form(self):
        sums = self.counted([1e-7, 1, 2, 0, 1e-6, 1, 1e-9, 0], approximation="reduce")
        assert sums.slots.tolist() == [3]  # the last row has no other token
        assert float(sums.gradients.trace) == pytest.approx(5 * (9 + 1))

    @pytest.mark.parametrize("broken", [torch.nan, torch.inf])
    @pytest.mark.parametrize("at", [0, 1])
    def test_what_is_not_finite_is_told(self, broken, at):
        sizes = [1.0] * 8
        sizes[at] = broken
        with pytest.raises(ValueError, match=r"g-factor .* is not finite"):
            self.counted(sizes).finish(1)
