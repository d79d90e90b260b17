"""The logits of an example that depend on chance, on other examples or on padding are told, and rounding is not."""

from __future__ import annotations

import random
import warnings
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from oracles.models import answer_logits, tiny_qwen, toy_batch, toy_model
from torch import Tensor, nn
from torch.nn.functional import batch_norm, dropout
from transformers import BatchEncoding

from bmoe_lightning.data.batches import Collate, EncodedQuestion
from bmoe_lightning.data.cloze import ClozeCollate
from bmoe_lightning.data.padding import shortened
from bmoe_lightning.experts import find_expert_layers
from bmoe_lightning.experts.example_check import check_examples
from bmoe_lightning.experts.tapped_batches import tapped_batch
from bmoe_lightning.models.choice_logits import choice_logits
from bmoe_lightning.models.last_logits import last_logits
from recipes.supported_models.tiny import build

QUESTION = EncodedQuestion(tuple(3 + i % 17 for i in range(13)), 4, 1, 0)
COLLATE = Collate(pad_id=0, num_choices=4)
AGAIN, ALONE = "called again with the same batch", "for the same example in a smaller batch"


def check(model, class_logits, batch, *, taps=False):
    """Check after a first call, as the contract's check makes it: with its random state restored."""
    with torch.random.fork_rng():
        if taps:
            with tapped_batch(model, find_expert_layers(model), class_logits, batch) as tapped:
                logits = tapped.logits.detach()
        else:
            with torch.no_grad():
                logits = class_logits(model.eval(), batch)[0]
    check_examples(model, class_logits, batch, logits)


def checked_silently(model, class_logits, batch, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(model, class_logits, batch, **options)


def causal(model, batch):
    return last_logits(model, batch["input_ids"], batch["attention_mask"])[:, 3:7], batch["label"]


def changed(change):
    def class_logits(model, batch):
        logits, labels = causal(model, batch)
        return change(logits), labels

    return class_logits


def padded_batch(side="left", rows=4):
    return {**replace(COLLATE, side=side)(shortened(QUESTION, rows)), "other": "x"}


def equal_lengths(rows=8, length=6):
    ids = torch.randint(3, 20, (rows, length), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "label": torch.zeros(rows, dtype=torch.int64)}


CHANCE = {
    "dropout": lambda f: dropout(f, 0.1),
    "torch": lambda f: f + 0.1 * f.std() * torch.randn_like(f),
    "numpy": lambda f: f + 0.1 * f.std() * torch.from_numpy(np.random.randn(*f.shape)).to(f.dtype),
    "python": lambda f: f * torch.tensor([random.random() for _ in range(4)]),
}


@pytest.mark.parametrize("taps", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chance(dtype, taps):
    model = tiny_qwen().to(dtype)
    for change in CHANCE.values():
        with pytest.raises(ValueError, match=AGAIN):
            check(model, changed(change), equal_lengths(), taps=taps)


def test_a_generator_of_its_own():
    generator = torch.Generator()
    with pytest.raises(ValueError, match=AGAIN):
        check(tiny_qwen(), changed(lambda f: f + torch.randn(f.shape, generator=generator)), equal_lengths())


def neighbours(f):
    return f + f.roll(1, 0)


def attended(f):
    return (f @ f.T).softmax(-1) @ f


MIXING = {
    "mean": lambda f: f - f.mean(0),
    "standardised": lambda f: batch_norm(f, None, None, training=True),  # not of one row
    "neighbours": neighbours,
    "attention": attended,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [equal_lengths, padded_batch], ids=["full", "padded"])
def test_examples_that_mix(make, dtype):
    """With padded rows too, where nothing is said of padding; in half precision some may be rounding."""
    model, batch = tiny_qwen().to(dtype), make()
    kinds = (ValueError, UserWarning) if dtype == torch.bfloat16 else ValueError
    for change in MIXING.values():
        with pytest.raises(kinds, match=ALONE):
            checked_silently(model, changed(change), batch)


def test_a_layer_that_mixes_examples():
    with pytest.raises(ValueError, match=ALONE):
        check(toy_model(mixes=True), answer_logits, toy_batch())


def test_few_rows_that_differ_are_warned_of():
    """As where a router is undecided."""

    def first_only(f):
        return torch.cat([f[:1] + (len(f) > 4) * torch.tensor([1.0, 0, 0, 0]), f[1:]])

    with pytest.warns(UserWarning, match=rf"{ALONE}.*if that is no rounding"):
        check(tiny_qwen(), changed(first_only), equal_lengths())


@dataclass
class Fields:
    input_ids: Tensor
    label: Tensor


def as_dictionary(given):
    if isinstance(given, Fields | SimpleNamespace):
        return vars(given)
    if isinstance(given, tuple):
        return dict(zip(("input_ids", "label"), given, strict=True))
    if isinstance(given, list):
        return {name: torch.stack([entry[name] for entry in given]) for name in given[0]}
    return {name: torch.as_tensor(values) for name, values in given.items()}


FORMS = {
    "tuple": lambda ids, label: (ids, label),
    "dataclass": Fields,
    "object": lambda ids, label: SimpleNamespace(input_ids=ids, label=label),
    "encoding": lambda ids, label: BatchEncoding({"input_ids": ids, "label": label}),
    "list of examples": lambda ids, label: [{"input_ids": i, "label": y} for i, y in zip(ids, label, strict=True)],
    "lists": lambda ids, label: {"input_ids": ids.tolist(), "label": label.tolist()},
    "arrays": lambda ids, label: {"input_ids": ids.numpy(), "label": label.numpy()},
}


@pytest.mark.parametrize("form", FORMS)
def test_batches_of_any_form_are_cut(form):
    ids = equal_lengths()["input_ids"]
    batch = FORMS[form](ids, torch.zeros(len(ids), dtype=torch.int64))

    def class_logits(model, given):
        entries = as_dictionary(given)
        return model(input_ids=entries["input_ids"]).logits[:, -1, 3:7], entries["label"]

    def mixing(model, given):
        logits, labels = class_logits(model, given)
        return logits - logits.mean(0), labels

    checked_silently(tiny_qwen(), class_logits, batch)
    with pytest.raises(ValueError, match=ALONE):
        check(tiny_qwen(), mixing, batch)


def counting(class_logits, calls):
    def run(model, batch):
        found = class_logits(model, batch)
        calls.append(len(found[0]))
        return found

    return run


def flattened(model, batch):
    """One row for each choice of 4 examples."""
    return model(input_ids=batch["input_ids"]).logits[:, -1, 3].view(-1, 2), batch["label"]


def one_sequence(model, batch):
    logits = model(input_ids=batch["input_ids"].reshape(1, -1)).logits[0, :, 3:7]
    return logits[5::6], None


def positioned(model, batch):
    at = batch["positions"].expand(batch["input_ids"].shape)
    return model(input_ids=batch["input_ids"], position_ids=at).logits[:, -1, 3:7] + at[:, -1:], None


@pytest.mark.parametrize(
    ("class_logits", "batch"),
    [
        (flattened, {"input_ids": equal_lengths(8)["input_ids"], "label": torch.zeros(4, dtype=torch.int64)}),
        (one_sequence, {"input_ids": equal_lengths(8)["input_ids"].reshape(1, -1)}),
        (positioned, {"input_ids": equal_lengths(6)["input_ids"], "positions": torch.arange(6)}),
        (lambda m, b: (causal(m, b)[0][: len(b["label"]) // 8 * 8 or 99], None), equal_lengths()),
    ],
    ids=["rows of choices", "one sequence", "as many positions as rows", "a refusal"],
)
def test_batches_without_a_row_for_each_example_are_not_cut(class_logits, batch):
    checked_silently(tiny_qwen(), class_logits, batch)


def test_a_batch_that_cannot_be_cut_is_run_once_more():
    calls = []
    batch = {"input_ids": equal_lengths(8)["input_ids"], "label": torch.zeros(4, dtype=torch.int64)}
    check(tiny_qwen(), counting(flattened, calls), batch)
    assert calls == [4, 4]
    with pytest.raises(ValueError, match=AGAIN):
        check(tiny_qwen(), lambda m, b: (dropout(flattened(m, b)[0], 0.5), None), batch)


@pytest.mark.filterwarnings("ignore:Sparse")
def test_a_padded_batch_with_an_entry_that_cannot_be_cut():
    model, batch = tiny_qwen(), padded_batch()
    batch["sparse"] = torch.eye(4).to_sparse()
    logits = causal(model, batch)[0].detach()
    for repeats in (False, True):
        check_examples(model, causal, batch, logits, repeats=repeats)


def test_code_that_takes_no_single_row():
    checked_silently(tiny_qwen(), changed(lambda f: f.squeeze()), equal_lengths())
    with pytest.raises(ValueError, match=ALONE):
        check(tiny_qwen(), changed(lambda f: f.squeeze() - f.mean(0)), equal_lengths())


@pytest.mark.parametrize(("batch", "expected"), [(equal_lengths(), [4]), (padded_batch(), [2, 1])])
def test_the_number_of_forward_passes(batch, expected):
    calls = []
    check(tiny_qwen(), counting(causal, calls), batch)
    assert calls[1:] == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["hy_v4", "glm4_moe_lite", "minimax", "jetmoe"])
def test_rounding_is_not_said(family, dtype):
    """Of the families in which rows alone and taps round most."""
    model = nn.Module.to(build(family).model, dtype)
    checked_silently(model, causal, equal_lengths(), taps=True)
    checked_silently(model, causal, padded_batch(), taps=True)


def test_autocast_rounds():
    def mixed_precision(model, batch):
        with torch.autocast("cpu", torch.bfloat16):
            logits, labels = causal(model, batch)
        # A row alone is rounded otherwise.
        return logits.float() * (1 + 0.01 * (len(logits) > 1)), labels

    checked_silently(tiny_qwen().float(), mixed_precision, equal_lengths())
    with pytest.raises(ValueError, match=ALONE):
        check(tiny_qwen(), changed(lambda f: f * (1 + 0.01 * (len(f) > 4))), equal_lengths())


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*quantization is deprecated")
def test_quantised_activations_round():
    """With one scale for all values of a batch."""
    model = tiny_qwen().float()
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, torch.qint8)
    checked_silently(quantised, causal, equal_lengths())


def test_statistics_of_training_are_no_mixing():
    model = tiny_qwen().float()
    model.norm_of_logits = nn.BatchNorm1d(4)
    checked_silently(model, lambda m, b: (m.norm_of_logits(causal(m, b)[0]), None), equal_lengths())


@pytest.mark.parametrize("side", ["left", "right"])
def test_as_many_classes_as_the_longest_question_of_the_batch(side):
    """Its padded row has fewer alone."""

    def class_logits(model, batch):
        logits, labels = causal(model, batch)
        choices = 2 + batch["attention_mask"].sum(1) % 3
        most = int(choices.max())
        return logits[:, :most].masked_fill(torch.arange(most) >= choices[:, None], -torch.inf), labels

    def padding_matters(model, batch):
        logits, labels = class_logits(model, batch)
        return logits * batch["attention_mask"].shape[1], labels

    calls = []
    checked_silently(tiny_qwen(), counting(lambda m, b: (class_logits(m, b)[0], None), calls), padded_batch(side))
    assert calls[1:] == [2, 1]
    with pytest.warns(UserWarning, match=f"padding changes the logits of row 2 .* on the {side}"):
        check(tiny_qwen(), padding_matters, padded_batch(side))


def test_a_padded_row_is_warned_of():
    blocks, model = build("deepseek_v4").model, tiny_qwen()
    with pytest.warns(UserWarning, match=r"padding changes the logits of row 2 .* does not ignore padding on the left"):
        check(blocks, causal, padded_batch())
    checked_silently(blocks, causal, padded_batch("right"))
    checked_silently(nn.Module.to(blocks, torch.bfloat16), causal, padded_batch("right"))
    checked_silently(model, causal, padded_batch())


def test_a_batch_of_one_padded_row():
    batch = {name: value[2:3] for name, value in COLLATE(shortened(QUESTION, 4)).items()}
    checked_silently(tiny_qwen(), causal, batch)
    with pytest.warns(UserWarning, match="padding changes the logits of row 0"):
        check(tiny_qwen(), lambda m, b: (causal(m, b)[0] * b["attention_mask"].shape[1], None), batch)


def several_rows(side="left"):
    """Four questions of two rows each, the first of which is the longer one."""
    questions = [
        replace(question, num_choices=2, choices=((5, 6, 7), (8,)), lengths=(1.0, 1.0))
        for question in shortened(QUESTION, 4)
    ]
    return dict(ClozeCollate(0, 2, side)(questions))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_of_examples_of_several_rows(side):
    def scores(model, batch):
        return choice_logits(model, batch), batch["label"]

    def padding_matters(model, batch):
        return choice_logits(model, batch) * batch["attention_mask"].shape[2], batch["label"]

    calls = []
    checked_silently(tiny_qwen(), counting(scores, calls), several_rows(side))
    assert calls[1:] == [2, 1]
    with pytest.warns(UserWarning, match=f"padding changes the logits of row 2 .* on the {side}"):
        check(tiny_qwen(), padding_matters, several_rows(side))


def test_a_mask_of_pairs_of_tokens_is_none_of_several_rows():
    batch = padded_batch()
    pairs = batch["attention_mask"].unsqueeze(1) * batch["attention_mask"].unsqueeze(2)

    def class_logits(model, batch):
        return causal(model, {**batch, "attention_mask": batch["attention_mask"].amax(1)})

    calls = []
    checked_silently(tiny_qwen(), counting(class_logits, calls), {**batch, "attention_mask": pairs})
    assert calls[1:] == [2]


def test_modes_and_random_states_are_restored():
    model = tiny_qwen().train()
    model.lm_head.eval()
    modes = [part.training for part in model.modules()]
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    seen = []

    def class_logits(model, batch):
        seen.append((model.training, torch.is_grad_enabled()))
        torch.rand(1), random.random(), np.random.rand()
        return causal(model, batch)

    batch = padded_batch()
    check_examples(model, class_logits, batch, causal(model.eval(), batch)[0])
    model.train()
    model.lm_head.eval()
    check_examples(model, class_logits, batch, causal(model, batch)[0])
    assert set(seen) == {(False, False)}
    assert [part.training for part in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]
    assert not any(part._forward_hooks for part in model.modules())
