"""Operations against torch's own count of what a small model does."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from oracles.planned import WORK, built, class_logits, small_batch, train
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode

from bmoe_lightning.curvature import LayerFactors, collect_factors
from bmoe_lightning.curvature.sketch import make_sketch
from bmoe_lightning.experts.grouped_matmul import ExpertGroups
from bmoe_lightning.experts.taps import Slots
from bmoe_lightning.laplace import LaplacePosterior
from bmoe_lightning.laplace.groups import SlotGroups, SlotKeys, group_slots, padded_groups
from bmoe_lightning.laplace.slot_terms import layer_terms
from recipes.plan import compute
from recipes.plan.architecture import describe


def _grouped(left, right, *_args, **_options):
    """Operations of torch's grouped product, which its counter does not know: slots are on the left or summed over."""
    return 2 * left[0] * left[1] * right[-1]


def _added(_total, left, right, **_options):
    """Operations of a product that is added in place, which it does not know either."""
    return 2 * left[0] * left[1] * right[-1]


def counted(function):
    unknown = {torch.ops.aten._grouped_mm: _grouped, torch.ops.aten.addmm_: _added}
    with FlopCounterMode(display=False, custom_mapping=unknown) as counter:
        function()
    return counter.get_total_flops()


@pytest.fixture(params=["all", "dense first and third"])
def model(request):
    options = {} if request.param == "all" else {"mlp_only_layers": [0, 2]}
    # Attention as plain products, which the counter sees.
    made = built(attention="eager", **options)
    made.set_experts_implementation("grouped_mm")
    return made


def test_forward(model):
    assert compute.forward(describe(model), WORK) == counted(lambda: class_logits(model, small_batch()))


def test_forward_whose_head_runs_everywhere(model):
    planned = replace(describe(model), one_position=False)
    assert compute.forward(planned, WORK) == counted(lambda: model(input_ids=small_batch()["ids"], use_cache=False))


@pytest.mark.parametrize("part", ["down_proj", "experts"])
def test_training_step(model, part):
    train(model, part)
    batch = small_batch()
    steps = counted(lambda: cross_entropy(*class_logits(model, batch)).backward())
    assert compute.training_step(describe(model), WORK, part) == pytest.approx(steps, rel=0.01)


@pytest.mark.parametrize("fisher", ["mc", "empirical", "exact"])
def test_curvature(model, fisher):
    steps = counted(lambda: collect_factors(model, class_logits, [small_batch()], rank=WORK.rank, fisher=fisher))
    assert compute.curvature_batch(describe(model), WORK, fisher) == pytest.approx(steps, rel=0.02)


def test_prediction(model):
    batch = small_batch()
    posterior = LaplacePosterior(collect_factors(model, class_logits, [batch], rank=WORK.rank))
    posterior.logit_covariance(model, class_logits, batch, centred=True)  # the first one also looks for mixed examples
    steps = counted(lambda: posterior.logit_covariance(model, class_logits, batch, centred=True))
    # A random router is not quite even.
    assert compute.prediction(describe(model), WORK) == pytest.approx(steps, rel=0.1)


@pytest.mark.parametrize(("width", "rank"), [(48, 5), (600, 5), (600, 200)])
def test_sketch(width, rank):
    groups = ExpertGroups(torch.arange(64) % 4, 4)
    options = {"device": torch.device("cpu"), "dtype": torch.float32, "generator": torch.Generator()}
    sketch = make_sketch("auto", 4, width, rank, **options)
    steps = counted(lambda: sketch.update(torch.ones(64, width), groups))
    assert 64 * compute.sketch_slot(width, rank) == steps


def test_kernels_under_an_even_router(model):
    work = replace(WORK, tokens=512)
    planned = describe(model)
    experts = planned.experts[0]
    count, d_in, d_out, top_k = 8, 48, 64, 2
    factors = LayerFactors(
        "l", 0, torch.ones(count), torch.ones(count, d_in, 5), torch.ones(count, 5), torch.ones(count, d_out, 5),
        torch.ones(count, 5), torch.ones(count), torch.ones(count),
    )  # fmt: skip
    chosen = torch.rand(work.positions, count, generator=torch.Generator().manual_seed(0)).topk(top_k).indices.flatten()
    owners = torch.arange(work.positions).repeat_interleave(top_k) // work.tokens
    slots = len(chosen)
    inputs, gradients = torch.ones(slots, d_in), [torch.ones(slots, d_out)] * 3
    keys = SlotKeys.of(Slots(inputs, chosen, None), gradients, owners, count, 4)
    steps = counted(lambda: layer_terms(inputs, gradients, group_slots([keys])[0], [factors], 4))
    alone = replace(planned, blocks=(replace(planned.blocks[-1], experts=(experts,)), planned.blocks[0]))
    rest = replace(alone, blocks=alone.blocks[:1])
    first = compute.kernels(replace(alone, blocks=(alone.blocks[0], replace(alone.blocks[1], experts=()))), work)
    assert first == pytest.approx(steps, rel=0.05)
    # Where no block looks back at earlier tokens, only each row's last one moves a logit.
    assert compute.kernels(rest, work) < first / 100


def test_heights_are_those_of_the_library():
    sizes = np.arange(1, 200)
    groups = SlotGroups(torch.arange(sizes.sum()), sizes, sizes, 0)
    wide = 1 << 30  # small layers are padded to one height
    padded = padded_groups(groups, wide, (1, 1), torch.device("cpu"))
    found = {int(i): rows.shape[1] for chosen, rows, _ in padded for i in chosen}
    assert [compute.height(size) for size in sizes.tolist()] == [found[i] for i in range(len(sizes))]
    assert compute.height(0) == 0


def test_more_classes_cost_one_pass_each(model):
    planned = describe(model)
    costs = [compute.curvature_batch(planned, replace(WORK, classes=k), "exact") for k in (2, 3, 4)]
    assert costs[0] == compute.curvature_batch(planned, WORK, "mc")
    assert costs[2] - costs[1] == pytest.approx(costs[1] - costs[0])
