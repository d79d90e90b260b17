import pytest
import torch
from oracles.cases import ARRANGEMENTS, layouts
from oracles.cases import built_with_layers as built
from oracles.dense import canonical, observe
from oracles.models import (
    answer_logits,
    packed_logits,
    toy_batch,
    toy_model,
)

from bmoe_lightning.experts import find_linear_layers, ownership, tapped_batch
from bmoe_lightning.experts.ownership import slot_owners


def owners_and_moves(model, layers, class_logits, batch):
    """For each layer: slots, owners, and which slots move a logit."""
    with tapped_batch(model, layers, class_logits, batch) as tapped:
        slots = [tapped.taps.slots(i) for i in range(len(layers))]
        owners = slot_owners(tapped, slots)
        weights = torch.linspace(1, 2, tapped.logits.shape[1]).expand(tapped.logits.shape)
        moves = [g.ne(0).any(1) for g in tapped.taps.gradients(tapped.logits, weights)]
    return list(zip(slots, owners, moves, strict=True))


@layouts
@pytest.mark.parametrize("case", ARRANGEMENTS)
def test_owners_by_definition(layout, case):
    class_logits, make_batch = ARRANGEMENTS[case]
    fused, model, layers = built(layout)
    batch = make_batch()
    _, observed = observe(fused, class_logits, batch)
    for (slots, owners, moves), seen in zip(
        owners_and_moves(model, layers, class_logits, batch), observed, strict=True
    ):
        assert int(moves.sum()) == int(seen.moves.sum())
        found = canonical(slots.experts[moves], slots.inputs[moves], owners[moves])
        wanted = canonical(seen.experts[seen.moves], seen.inputs[seen.moves], seen.owners[seen.moves])
        torch.testing.assert_close(found[1], wanted[1], rtol=1e-11, atol=1e-13)
        assert torch.equal(found[2], wanted[2])
        assert len(found[2].unique()) == len(batch["labels"])


@pytest.fixture
def asked(monkeypatch):
    """How many layers each round of gradients was asked for."""
    sizes = []
    by_gradient = ownership._owners_by_gradient

    def spy(batch, positions, most):
        sizes.append(len(positions))
        return by_gradient(batch, positions, most)

    monkeypatch.setattr(ownership, "_owners_by_gradient", spy)
    return sizes


def test_rows_need_the_last_layer_only(asked):
    _, model, layers = built("fused", num_layers=3)
    owners_and_moves(model, layers, answer_logits, toy_batch())
    assert asked == [1]
    owners_and_moves(model, layers, packed_logits, toy_batch(num_rows=6))
    assert asked[1:] == [1, 3]


def test_hidden_rows_ask_all_layers(asked):
    _, model, layers = built("modules", num_layers=3)
    owners_and_moves(model, layers, answer_logits, toy_batch())
    assert asked == [3]


def test_a_head_on_chosen_positions_asks_no_other_layer(asked):
    """The rows of its inputs are not known, and its own gradients are cheap."""
    model, batch = toy_model(num_layers=3), toy_batch()
    layers = [*find_linear_layers(model, "*.query"), *find_linear_layers(model, "head", first_index=3)]

    def class_logits(m, b):
        with m.head.register_forward_pre_hook(lambda _, args: (args[0][:, -1:],)):
            output = m(input_ids=b["ids"], attention_mask=b["mask"])
        return output[:, 0, [3, 5, 7]], b["labels"]

    found = owners_and_moves(model, layers, class_logits, batch)
    assert asked == [1, 1]
    assert torch.equal(found[-1][1], torch.arange(5))
    expected = owners_and_moves(model, layers[:-1], class_logits, batch)
    for (_, owners, moves), (_, alone, _) in zip(found, expected, strict=False):
        assert moves.any()
        assert torch.equal(owners, alone)


@layouts
def test_a_single_example_owns_everything(layout, asked):
    _, model, layers = built(layout)
    for _, owners, _ in owners_and_moves(model, layers, answer_logits, toy_batch(num_rows=1)):
        assert bool((owners == 0).all())
    assert asked == []


@pytest.mark.parametrize("num_rows", [31, 32, 33, 70, 1100])
def test_many_examples(num_rows):
    """More than 32 examples need several digits, more than 1024 need three."""
    _, model, layers = built("modules")
    _, fused, fused_layers = built("fused")
    batch = toy_batch(num_rows=num_rows, length=3)
    found = owners_and_moves(model, layers, answer_logits, batch)
    expected = owners_and_moves(fused, fused_layers, answer_logits, batch)
    for (slots, owners, moves), (seen, row_owners, row_moves) in zip(found, expected, strict=True):
        assert torch.equal(row_owners[row_moves], seen.rows[row_moves])  # row n is example n
        # Different rows may hold the very same tokens, so what each example owns is compared as a sum.
        totals = [torch.zeros(num_rows * 4, 5, dtype=torch.float64) for _ in range(2)]
        totals[0].index_add_(0, owners[moves] * 4 + slots.experts[moves], slots.inputs[moves])
        totals[1].index_add_(0, row_owners[row_moves] * 4 + seen.experts[row_moves], seen.inputs[row_moves])
        assert len(owners[moves].unique()) == num_rows
        torch.testing.assert_close(*totals, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_floats(dtype):
    _, model, layers = built("modules")
    model.to(dtype)
    batch = toy_batch(num_rows=40)
    _, observed = observe(toy_model().to(dtype), answer_logits, batch)
    for (slots, owners, moves), seen in zip(
        owners_and_moves(model, layers, answer_logits, batch), observed, strict=True
    ):
        found = canonical(slots.experts[moves], slots.inputs[moves], owners[moves])
        # The owner of slot s in the model's own loop is its row. Routing may differ by rounding.
        rows = (seen.tokens // 7)[seen.moves].bincount(minlength=40)
        assert int((found[2].bincount(minlength=40) - rows).abs().sum()) <= 4
        assert int(found[2].min()) >= 0


@layouts
def test_unreachable_slots_have_no_owner_where_gradients_are_asked(layout):
    _, model, layers = built(layout)
    batch = toy_batch()
    *_, (_, owners, moves) = owners_and_moves(model, layers, answer_logits, batch)
    if layout == "modules":
        assert torch.equal(owners == -1, ~moves)
    else:
        assert int(owners.min()) >= 0  # by its row


@layouts
def test_absent_classes(layout):
    fused, model, layers = built(layout)
    batch = toy_batch()
    batch["absent"] = torch.zeros(5, 4, dtype=torch.bool)
    batch["absent"][:3, 2:] = True
    _, observed = observe(fused, answer_logits, batch)
    for (slots, owners, moves), seen in zip(
        owners_and_moves(model, layers, answer_logits, batch), observed, strict=True
    ):
        found = canonical(slots.experts[moves], slots.inputs[moves], owners[moves])
        wanted = canonical(seen.experts[seen.moves], seen.inputs[seen.moves], seen.owners[seen.moves])
        assert torch.equal(found[2], wanted[2])


def test_a_layer_that_mixes_examples_is_refused():
    _, model, layers = built("modules", mixes=True)
    with pytest.raises(RuntimeError, match="moves the logits of several examples"):
        owners_and_moves(model, layers, answer_logits, toy_batch())


@layouts
@pytest.mark.parametrize("num_rows", [4, 5])  # the mean of 4 has no rounding error, so that a sum of effects is 0
def test_logits_that_mix_examples_are_refused(layout, num_rows):
    _, model, layers = built(layout)

    def class_logits(m, batch):
        logits, labels = answer_logits(m, batch)
        return logits - logits.mean(0, keepdim=True), labels

    with pytest.raises(RuntimeError, match="Give each example separate rows"):
        owners_and_moves(model, layers, class_logits, toy_batch(num_rows))


@layouts
def test_examples_that_see_each_other_in_one_row_are_refused(layout):
    """Packed without a mask between them, the second example reads the first."""
    _, model, layers = built(layout)

    def class_logits(m, batch):
        ids, mask = (batch[name].view(-1, 14) for name in ("ids", "mask"))
        output = m(input_ids=ids, attention_mask=mask)
        return output[:, [6, 13]].flatten(0, 1)[:, [3, 5, 7, 9]], batch["labels"]

    with pytest.raises(RuntimeError, match="share a sequence"):
        owners_and_moves(model, layers, class_logits, toy_batch(num_rows=6))


def test_mixing_below_the_last_layer_is_noticed_when_asked_for():
    _, model, layers = built("fused", mixes=True)
    batch = toy_batch(4)
    with tapped_batch(model, layers, answer_logits, batch) as tapped:
        slots = [tapped.taps.slots(position) for position in range(len(layers))]
        with pytest.raises(RuntimeError, match="several examples"):
            slot_owners(tapped, slots, thorough=True)
