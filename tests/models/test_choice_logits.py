"""Log-probabilities of choices: against a loop over single sequences, and the engine on them against dense oracles."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from oracles import dense
from oracles.models import tiny_qwen

from bmoe_lightning.curvature import collect_factors
from bmoe_lightning.data.batches import EncodedQuestion
from bmoe_lightning.data.cloze import ClozeCollate
from bmoe_lightning.data.padding import measured_padding_side, padding_error, shares_prompts, shortened
from bmoe_lightning.experts import find_expert_layers
from bmoe_lightning.experts.ownership import slot_owners
from bmoe_lightning.experts.tapped_batches import tapped_batch
from bmoe_lightning.laplace import LaplacePosterior
from bmoe_lightning.models.choice_logits import choice_logits
from recipes.supported_models.tiny import build

FULL = 100  # a rank beyond every width
layouts = pytest.mark.parametrize("shared", [False, True], ids=["a row a choice", "one row"])
sides = pytest.mark.parametrize("side", ["left", "right"])


def questions():
    """Prompts of 5, 8 and 3 tokens; 3, 2 and 3 choices of 1 to 4 tokens, two of which begin alike."""
    generator = torch.Generator().manual_seed(0)

    def tokens(count):
        return tuple(torch.randint(1, 30, (count,), generator=generator).tolist())

    choices = [(tokens(1), tokens(3), tokens(2)), (tokens(4), tokens(2)), ((7, 8), (7, 9, 7), (7,))]
    lengths = [(1.0, 1.0, 1.0), (3.0, 2.0), (9.0, 4.0, 1.0)]
    return [
        EncodedQuestion(tokens(count), len(of_question), label, index, of_question, of_length)
        for index, (count, of_question, of_length, label) in enumerate(
            zip((5, 8, 3), choices, lengths, (2, 0, 1), strict=True)
        )
    ]


def collated(items=None, *, shared=False, side="left"):
    return ClozeCollate(pad_id=0, num_choices=3, side=side, shared=shared)(questions() if items is None else items)


def class_logits(model, batch):
    return choice_logits(model, batch), batch["label"]


def one_by_one(model, items):
    """Sequences without padding, one after the other, and a loop over their tokens."""
    found = torch.full((len(items), 3), -torch.inf, dtype=torch.float64)
    for example, item in enumerate(items):
        for number, choice in enumerate(item.choices):
            ids = torch.tensor([item.token_ids + choice])
            log_probs = model(input_ids=ids).logits[0].double().log_softmax(-1)
            places = range(len(item.token_ids), ids.shape[1])
            found[example, number] = sum(log_probs[place - 1, ids[0, place]] for place in places) / item.lengths[number]
    return found


@pytest.fixture(scope="module")
def model():
    return tiny_qwen()


@layouts
@sides
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_score_is_the_sum_of_log_probabilities_over_the_length(shared, side, attention):
    model = tiny_qwen(dtype=torch.float32)
    model.set_attn_implementation(attention)
    with torch.no_grad():
        found = choice_logits(model, collated(shared=shared, side=side))
        expected = one_by_one(model, questions())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    assert found[1, 2] == -torch.inf


@layouts
def test_half_precision_is_summed_in_float32(shared):
    with torch.no_grad():
        found = choice_logits(tiny_qwen(dtype=torch.bfloat16), collated(shared=shared))
    assert found.dtype == torch.float32


@layouts
@sides
def test_no_row_is_run_for_an_absent_choice_and_the_head_on_positions_before_choices_only(model, shared, side):
    seen = {}

    def see(_module, args, kwargs, output):
        seen.update(rows=kwargs["input_ids"].shape, logits=output.logits.shape)

    handle = model.register_forward_hook(see, with_kwargs=True)
    with torch.no_grad():
        choice_logits(model, collated(shared=shared, side=side))
    handle.remove()
    assert seen["rows"] == ((3, 14) if shared else (8, 12))
    # Positions before a token of a choice; in one row, the end of the prompt is before each choice.
    batch = collated(shared=shared, side=side)
    before = set()
    for example, row, place in (batch["choice_index"] >= 0).nonzero().tolist():
        choices = batch["choice_index"][example, row].tolist()
        is_first = choices[place] != choices[place - 1]
        before.add(next(at for at, choice in enumerate(choices) if choice >= 0) - 1 if is_first else place - 1)
    assert seen["logits"][1] == len(before) < seen["rows"][1]
    if side == "left":
        assert len(before) <= 1 + (6 if shared else 4) - 1


def test_rows_that_are_neither_one_nor_one_a_choice_are_refused(model):
    batch = collated()
    batch = {name: value[:, :2] if value.dim() == 3 else value for name, value in batch.items()}
    with pytest.raises(ValueError, match=r"\(3, 2, 12\) for 3 choices; give \[B, 3, T\]"):
        choice_logits(model, batch)


@layouts
def test_a_choice_without_tokens_and_a_row_without_a_prompt_are_refused(model, shared):
    items = questions()
    emptied = replace(items[1], choices=(items[1].choices[0], ()))
    with pytest.raises(ValueError, match=r"example 1 of the batch has a choice without tokens.*mask it in choice_mask"):
        choice_logits(model, collated([items[0], emptied], shared=shared))
    with pytest.raises(ValueError, match="example 0 of the batch has a row that begins with a choice"):
        choice_logits(model, collated([replace(items[0], token_ids=()), items[1]], shared=shared))


def test_attention_without_a_mask_of_pairs_shares_no_row(model):
    other = tiny_qwen()
    other.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="cannot share a row; give each its own row"):
        choice_logits(other, collated(shared=True))


def dense_of(model, batch, approximation="expand"):
    """Logits with graph, and factors of each layer, by definition."""
    logits, layers = dense.observe(model, class_logits, batch)
    hessians = dense.softmax_hessian(logits)
    factors = [dense.dense_kfac(layer, hessians, layer.owners, 4, approximation) for layer in layers]
    return logits, layers, factors


@layouts
@sides
def test_owners_are_those_of_the_oracle(model, shared, side):
    batch = collated(shared=shared, side=side)
    layers = find_expert_layers(model)
    with tapped_batch(model, layers, class_logits, batch) as tapped:
        slots = [tapped.taps.slots(position) for position in range(len(layers))]
        found = [
            (layer.experts, layer.inputs, owners)
            for layer, owners in zip(slots, slot_owners(tapped, slots, thorough=True), strict=True)
        ]
    _, observed = dense.observe(model, class_logits, batch)
    for (experts, inputs, owners), expected in zip(found, observed, strict=True):
        moves = expected.owners != -1
        mine = dense.canonical(experts, inputs, owners)
        theirs = dense.canonical(expected.experts, expected.inputs, expected.owners)
        torch.testing.assert_close(mine[1], theirs[1])
        known = theirs[2] != -1
        assert int(moves.sum()) == int(known.sum()) > 0
        # The prompt's copies have equal inputs: ties of one example.
        assert torch.equal(mine[2][known], theirs[2][known])
        # Unless it is padding, a token moves the scores of its own question alone.
        assert not (expected.owners == -2).any()


@layouts
@sides
@pytest.mark.parametrize("approximation", ["expand", "reduce"])
def test_factors_are_the_dense_sums(model, shared, side, approximation):
    batch = collated(shared=shared, side=side)
    factors = collect_factors(model, class_logits, [batch], rank=FULL, sketch="exact", approximation=approximation)
    _, _, expected = dense_of(model, batch, approximation)
    for layer, of_layer in zip(factors.layers, expected, strict=True):
        torch.testing.assert_close(layer.slots, of_layer.slots)
        found = dense.low_rank_blocks(layer)
        for expert in range(layer.num_experts):
            torch.testing.assert_close(found[expert], of_layer.block(expert), rtol=1e-6, atol=1e-7)


@layouts
@sides
def test_covariance_is_the_dense_one(model, shared, side):
    batch = collated(shared=shared, side=side)
    posterior = LaplacePosterior(collect_factors(model, class_logits, [batch], rank=FULL, sketch="exact"), 0.7)
    logits, covariance = posterior.logit_covariance(model, class_logits, batch)
    dense_logits, _, factors = dense_of(model, batch)
    parameters = [layer.mlp.experts.down_proj for layer in model.model.layers]
    with torch.enable_grad():
        scores = choice_logits(model, batch)
    jacobians = dense.weight_jacobians(scores, parameters)
    blocks = [[layer.block(expert) for expert in range(4)] for layer in factors]
    expected = dense.dense_logit_covariance(jacobians, blocks, [0.7, 0.7])
    torch.testing.assert_close(logits, dense_logits.detach())
    torch.testing.assert_close(covariance, expected, rtol=1e-6, atol=1e-9)
    assert not covariance[1, 2].any()


def test_one_row_and_a_row_a_choice_have_the_same_logits_and_the_same_covariance(model):
    apart, together = collated(), collated(shared=True)
    posterior = LaplacePosterior(collect_factors(model, class_logits, [apart], rank=3), 0.7)
    expected = posterior.logit_covariance(model, class_logits, apart)
    found = posterior.logit_covariance(model, class_logits, together)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


@layouts
def test_batches_may_be_split(model, shared):
    items = questions()
    posterior = LaplacePosterior(collect_factors(model, class_logits, [collated(shared=shared)], rank=3), 0.7)
    whole = posterior.predict(model, class_logits, collated(shared=shared), num_samples=50)
    parts = [posterior.predict(model, class_logits, collated([item], shared=shared), num_samples=50) for item in items]
    torch.testing.assert_close(torch.cat(parts), whole)


@layouts
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("precision", [1.0, 1e-4])
def test_choices_of_the_same_tokens_are_equally_probable(shared, dtype, precision):
    """Their logits are equal for all weights: all of the covariance of their differences is rounding."""
    model = tiny_qwen(dtype=dtype)
    items = questions()
    alike = [items[0], replace(items[0], choices=((4, 5, 6),) * 3), items[2]]
    factors = collect_factors(model, class_logits, [collated(shared=shared)], rank=3)
    posterior = LaplacePosterior(factors, precision)
    for link in ("mc", "isotropic", "probit"):
        log_probs = posterior.predict(model, class_logits, collated(alike, shared=shared), link, num_samples=20)
        torch.testing.assert_close(log_probs[1].exp().double(), torch.full((3,), 1 / 3).double(), rtol=1e-2, atol=0)


def test_a_token_of_another_choice_has_no_effect(model):
    items = questions()
    changed = replace(items[0], choices=(items[0].choices[0], (1, 2, 3), items[0].choices[2]))
    with torch.no_grad():
        before, after = (choice_logits(model, collated([item], shared=True))[0] for item in (items[0], changed))
    assert torch.equal(before[[0, 2]], after[[0, 2]])
    assert before[1] != after[1]


# Attention in windows and in blocks, recurrent layers, convolutions; and attention over all positions.
FAMILIES = {
    "mixtral": False,
    "minimax_m3_vl": False,
    "jamba": False,
    "lfm2_moe": False,
    "qwen3_moe": True,
    "gemma4": False,
    "granitemoe": True,
    "bmoe_lightning.deepseek_moe": True,
}


@pytest.mark.parametrize(("family", "expected"), FAMILIES.items())
def test_rows_are_those_of_single_sequences_and_shared_where_that_leaves_the_logits_as_they_are(family, expected):
    model = torch.nn.Module.to(build(family).model, torch.float32)
    generator = torch.Generator().manual_seed(1)
    prompt, *choices = (tuple(torch.randint(12, 30, (n,), generator=generator).tolist()) for n in (14, 3, 1, 5))
    question = EncodedQuestion(prompt, 3, 0, 0, tuple(choices), (1.0, 1.0, 1.0))

    def scores(batch):
        return choice_logits(model, batch), batch["label"]

    side = measured_padding_side(model, scores, question, ClozeCollate(0, 3), 4)
    collate = ClozeCollate(0, 3, side)
    assert shares_prompts(model, scores, question, collate, 4) is expected
    items = shortened(question, 4)
    with torch.no_grad():
        alone = one_by_one(model, items)
        assert padding_error(scores(collate(items))[0], alone) < 1e-5
        if expected:
            assert padding_error(scores(replace(collate, shared=True)(items))[0], alone) < 1e-5
