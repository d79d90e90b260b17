import pytest
import torch
from oracles.cases import FULL, built, layouts
from oracles.dense import (
    dense_ggn,
    experts_modules,
    low_rank_blocks,
    softmax_hessian,
    weight_jacobians,
)
from oracles.factors import assert_dense, assert_same, dense_of, matrices
from oracles.models import (
    answer_logits,
    as_modules,
    choice_batch,
    choices_by_class,
    choices_by_example,
    choices_one_call_each,
    choices_permuted,
    packed_logits,
    split,
    taken,
    toy_batch,
    toy_model,
)

from bmoe_lightning.curvature import collect_factors
from bmoe_lightning.curvature.fisher import fisher_weights


def score_outer(logits, labels):
    """`s s^T` of the score of a label."""
    score = torch.nn.functional.one_hot(labels, logits.shape[1]) - logits.detach().softmax(-1)
    return score.unsqueeze(2) * score.unsqueeze(1)


@layouts
@pytest.mark.parametrize("approximation", ["expand", "reduce"])
def test_exact_fisher_by_definition(layout, approximation):
    fused, model = built(layout, idle=[2])
    batch = toy_batch(num_rows=6)
    factors = collect_factors(
        model, answer_logits, split(batch, 2, 3, 1), rank=FULL, approximation=approximation, sketch="exact"
    )
    dense = dense_of(fused, answer_logits, batch, approximation)
    assert float(dense[0].slots[2]) == 0
    assert_dense(factors, dense)
    assert (factors.num_examples, factors.num_examples_used) == (6, 6)


@layouts
@pytest.mark.parametrize("approximation", ["expand", "reduce"])
def test_empirical_fisher_by_definition(layout, approximation):
    fused, model = built(layout)
    batch = toy_batch()
    factors = collect_factors(
        model, answer_logits, [batch], rank=FULL, fisher="empirical", approximation=approximation, sketch="exact"
    )
    dense = dense_of(fused, answer_logits, batch, approximation, lambda f: score_outer(f, batch["labels"]))
    assert_dense(factors, dense)


@layouts
def test_mc_fisher_by_definition(layout):
    """With the labels that the seed draws, batch by batch, it is the empirical Fisher of these labels."""
    fused, model = built(layout)
    batch = toy_batch(num_rows=6)
    factors = collect_factors(model, answer_logits, split(batch, 4, 2), rank=FULL, fisher="mc", sketch="exact", seed=5)
    generator = torch.Generator().manual_seed(5)
    log_probs = answer_logits(fused, batch)[0].detach().log_softmax(-1)
    weights = torch.cat([fisher_weights("mc", part, generator=generator)[0] for part in log_probs.split([4, 2])])
    drawn = weights.argmax(1)
    assert not torch.equal(drawn, batch["labels"])
    dense = dense_of(fused, answer_logits, batch, "expand", lambda f: score_outer(f, drawn))
    assert_dense(factors, dense)

    again = collect_factors(model, answer_logits, split(batch, 4, 2), rank=FULL, fisher="mc", sketch="exact", seed=5)
    other = collect_factors(model, answer_logits, split(batch, 4, 2), rank=FULL, fisher="mc", sketch="exact", seed=6)
    assert all(torch.equal(x.g_trace, y.g_trace) for x, y in zip(factors.layers, again.layers, strict=True))
    assert not all(torch.equal(x.g_trace, y.g_trace) for x, y in zip(factors.layers, other.layers, strict=True))


def test_drawn_labels_are_right_on_average():
    model, batch = toy_model(num_layers=1), toy_batch()
    exact = collect_factors(model, answer_logits, [batch], rank=FULL)
    many = [collect_factors(model, answer_logits, [batch] * 50, rank=FULL, fisher="mc", seed=s) for s in range(4)]
    mean = sum(m.layers[0].g_trace for m in many) / 4
    torch.testing.assert_close(mean, exact.layers[0].g_trace, rtol=0.25, atol=0)


@layouts
def test_slots_are_counted_by_their_gradient(layout):
    """The last layer counts one position an example, top-2; the first all real positions."""
    _, model = built(layout)
    batch = toy_batch()
    factors = collect_factors(model, answer_logits, [batch])
    assert float(factors.layers[0].slots.sum()) == 2 * int(batch["mask"].sum())
    assert float(factors.layers[1].slots.sum()) == 2 * len(batch["ids"])


@pytest.mark.parametrize("approximation", ["expand", "reduce"])
def test_batch_split_order_and_padding_do_not_matter(approximation):
    model, batch = toy_model(), toy_batch(num_rows=8)
    options = {"rank": FULL, "approximation": approximation}
    whole = collect_factors(model, answer_logits, [batch], **options)
    for other in (
        split(batch, *[1] * 8),
        split(batch, 3, 5),
        [taken(batch, torch.randperm(8))],
        split(taken(batch, torch.randperm(8)), 2, 6),
        [toy_batch(num_rows=8, pad="right")],
    ):
        assert_same(collect_factors(model, answer_logits, other, **options), whole)


@pytest.mark.parametrize("sketch", ["nystrom", "exact"])
def test_batches_of_one_three_and_eight(sketch):
    """However many batches a training step accumulates, the factors are those of the examples."""
    model, batch = toy_model(), toy_batch(num_rows=24)
    one, three, eight = (
        collect_factors(model, answer_logits, split(batch, *[size] * (24 // size)), rank=FULL, sketch=sketch)
        for size in (1, 3, 8)
    )
    assert_same(three, one)
    assert_same(eight, one)


def test_low_rank_sketch_does_not_see_the_split():
    model, batch = toy_model(width=12, inner=12), toy_batch(num_rows=8)
    options = {"rank": 2, "sketch": "nystrom"}
    whole = collect_factors(model, answer_logits, [batch], **options)
    order = torch.randperm(8)
    assert_same(collect_factors(model, answer_logits, split(taken(batch, order), 3, 5), **options), whole, 1e-8)
    assert float(whole.layers[0].discarded_energy().max()) > 0.01


@pytest.mark.parametrize("approximation", ["expand", "reduce"])
def test_data_seven_times_over(approximation):
    """Counts grow by seven, factors stay."""
    model, batch = toy_model(), toy_batch()
    once = collect_factors(model, answer_logits, [batch], rank=FULL, approximation=approximation)
    often = collect_factors(model, answer_logits, [batch] * 7, rank=FULL, approximation=approximation)
    for x, y in zip(often.layers, once.layers, strict=True):
        torch.testing.assert_close(x.slots, 7 * y.slots)
        for p, q in zip(matrices(x), matrices(y), strict=True):
            assert float((p - q).abs().max()) <= 1e-11 * float(q.abs().max())


def test_a_part_stands_for_the_whole():
    model, batch = toy_model(), toy_batch()
    part = collect_factors(model, answer_logits, [batch], rank=FULL)
    scaled = collect_factors(model, answer_logits, [batch], rank=FULL, num_examples=20)
    assert (scaled.num_examples, scaled.num_examples_used) == (20, 5)
    for x, y in zip(scaled.layers, part.layers, strict=True):
        torch.testing.assert_close(x.slots, 4 * y.slots)
        torch.testing.assert_close(x.curvature(), 4 * y.curvature())
        assert torch.equal(x.a_eigenvalues, y.a_eigenvalues)


@pytest.mark.parametrize("approximation", ["expand", "reduce"])
@pytest.mark.parametrize("fisher", ["exact", "mc", "empirical"])
def test_copies_in_a_module_list_give_the_same(fisher, approximation):
    fused, modules = toy_model(), as_modules(toy_model())
    options = {"rank": FULL, "fisher": fisher, "approximation": approximation}
    batches = split(toy_batch(num_rows=7), 3, 4)
    found = collect_factors(modules, answer_logits, batches, **options)
    assert_same(found, collect_factors(fused, answer_logits, batches, **options))


@layouts
@pytest.mark.parametrize("approximation", ["expand", "reduce"])
@pytest.mark.parametrize("arrangement", [choices_by_class, choices_permuted, choices_one_call_each])
def test_rows_may_lie_in_any_order(layout, approximation, arrangement):
    fused, model = built(layout)
    batch, options = choice_batch(), {"rank": FULL, "approximation": approximation}
    found = collect_factors(model, arrangement, [batch], **options)
    assert_same(found, collect_factors(fused, choices_by_example, [batch], **options))
    assert_dense(found, dense_of(fused, choices_by_example, batch, approximation))


@pytest.mark.parametrize("approximation", ["expand", "reduce"])
def test_examples_packed_in_one_row(approximation):
    model, batch = toy_model(), toy_batch(num_rows=6)
    options = {"rank": FULL, "approximation": approximation}
    assert_same(
        collect_factors(model, packed_logits, [batch], **options),
        collect_factors(model, answer_logits, [batch], **options),
    )


def test_ragged_classes():
    model, batch = toy_model(), toy_batch()
    batch["absent"] = torch.zeros(5, 4, dtype=torch.bool)
    batch["absent"][[0, 3], [1, 0]] = True
    factors = collect_factors(model, answer_logits, [batch], rank=FULL)
    assert_dense(factors, dense_of(model, answer_logits, batch, "expand"))


def test_absent_class_is_a_class_that_cannot_be():
    """A fourth class that is absent everywhere is no class at all."""
    model, batch = toy_model(), toy_batch()
    padded = {**batch, "absent": torch.tensor([False, False, False, True]).expand(5, 4)}

    def three(m, b):
        logits, labels = answer_logits(m, b)
        return logits[:, :3], labels

    assert_same(
        collect_factors(model, answer_logits, [padded], rank=FULL), collect_factors(model, three, [batch], rank=FULL)
    )


@layouts
def test_one_slot_an_expert_is_the_exact_ggn(layout):
    """With a single slot the Kronecker product is no approximation."""
    fused, model = built(layout, num_layers=1, top_k=1)
    batch = toy_batch(num_rows=1)
    logits = answer_logits(fused, batch)[0]
    parameters = [m.down_proj for m in experts_modules(fused)]
    exact = dense_ggn(weight_jacobians(logits, parameters)[0], softmax_hessian(logits))
    factors = collect_factors(model, answer_logits, [batch], rank=FULL)
    assert float(factors.layers[0].slots.sum()) == 1
    found = torch.stack(low_rank_blocks(factors.layers[0]))
    assert float((found - exact).abs().max()) <= 1e-11 * float(exact.abs().max())


@pytest.mark.parametrize("mask", [-torch.inf, torch.finfo(torch.float32).min, -1e9])
@pytest.mark.parametrize("columns", ["the same", "any"])
def test_absent_classes_take_no_backward_pass(columns, mask):
    """Nine columns: four of the model's, and those of a larger answer set that no example has, or each has four."""
    model, batch = toy_model(), toy_batch()
    size, passes = len(batch["ids"]), []
    place = torch.arange(2, 6).expand(size, 4)
    if columns == "any":
        place = torch.rand(size, 9, generator=torch.Generator().manual_seed(2)).argsort(1)[:, :4].sort(1).values

    def wide_logits(model, batch):
        logits, labels = answer_logits(model, batch)
        wide = torch.full((size, 9), float(mask), dtype=logits.dtype).scatter(1, place, logits)
        if wide.requires_grad:
            wide.register_hook(lambda gradient: passes.append(1))
        return wide, labels

    found = collect_factors(model, wide_logits, [batch], rank=FULL)
    assert len(passes) == 3  # of four classes
    for class_logits in (answer_logits, wide_logits):
        assert_dense(found, dense_of(model, class_logits, batch, "expand"))


@pytest.mark.parametrize("approximation", ["expand", "reduce"])
def test_repeated_example_is_the_exact_ggn(approximation):
    """The same slot many times over: the mean of the Kronecker products is the product of the means."""
    model = toy_model(num_layers=1, top_k=4)
    batch = {name: value.expand(3, *value.shape[1:]) for name, value in toy_batch(num_rows=1).items()}
    logits = answer_logits(model, batch)[0]
    exact = dense_ggn(weight_jacobians(logits, [experts_modules(model)[0].down_proj])[0], softmax_hessian(logits))
    factors = collect_factors(model, answer_logits, [batch], rank=FULL, approximation=approximation)
    assert factors.layers[0].slots.tolist() == [3] * 4
    found = torch.stack(low_rank_blocks(factors.layers[0]))
    assert float((found - exact).abs().max()) <= 1e-11 * float(exact.abs().max())


def test_kfac_is_an_approximation_elsewhere():
    """So that the two tests above are known to be able to fail."""
    model, batch = toy_model(num_layers=1, top_k=4), toy_batch()
    logits = answer_logits(model, batch)[0]
    exact = dense_ggn(weight_jacobians(logits, [experts_modules(model)[0].down_proj])[0], softmax_hessian(logits))
    found = torch.stack(low_rank_blocks(collect_factors(model, answer_logits, [batch], rank=FULL).layers[0]))
    assert float((found - exact).abs().max()) > 0.01 * float(exact.abs().max())


def test_rank_keeps_the_leading_part():
    model, batch = toy_model(width=8, inner=8), toy_batch(num_rows=12)
    full = collect_factors(model, answer_logits, [batch], rank=FULL).layers[0]
    low = collect_factors(model, answer_logits, [batch], rank=3).layers[0]
    assert low.a_basis.shape == (4, 8, 3)
    torch.testing.assert_close(low.a_eigenvalues, full.a_eigenvalues[:, :3], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(low.g_eigenvalues, full.g_eigenvalues[:, :3], rtol=1e-9, atol=1e-12)
    expected = 1 - low.curvature().sum((1, 2)) / full.curvature().sum((1, 2))
    torch.testing.assert_close(low.discarded_energy(), expected, rtol=1e-8, atol=1e-12)
