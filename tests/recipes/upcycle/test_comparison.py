"""The batch on which logits are compared, and the numbers that come of it."""

from __future__ import annotations

import pytest
import torch
import upcycle_cases as cases
from torch.nn.functional import kl_div

from recipes.upcycle.comparison import difference, logits_of, text_batch, tokens_per_expert


def test_half_of_the_rows_are_text():
    tokenizer = cases.tokenizer()
    batch = text_batch(tokenizer, len(tokenizer), rows=4, length=200, seed=0)
    assert batch.shape == (4, 200)
    assert "sunlight" in tokenizer.decode(batch[0])
    assert not torch.equal(batch[0], batch[1])  # the sentences are in another order
    assert len(batch[2].unique()) > 50
    assert torch.equal(batch, text_batch(tokenizer, len(tokenizer), rows=4, length=200, seed=0))
    assert not torch.equal(batch, text_batch(tokenizer, len(tokenizer), rows=4, length=200, seed=1))


def test_a_tokenizer_of_another_model_is_refused():
    with pytest.raises(ValueError, match=r"the tokenizer does not fit the model: .*, and the model has 20"):
        text_batch(cases.tokenizer(), 20, rows=2, length=8, seed=0)


def test_difference_is_that_of_its_definition():
    dense, moe = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    found = difference(dense, moe)
    assert found.largest == pytest.approx(float((dense - moe).abs().max()))
    assert found.largest_logit == pytest.approx(float(dense.abs().max()))
    expected = (
        kl_div(moe.double().log_softmax(-1), dense.double().log_softmax(-1), log_target=True, reduction="sum") / 6
    )
    assert found.divergence == pytest.approx(float(expected))
    assert not found.is_rounding
    assert difference(dense, dense * (1 + 1e-6)).is_rounding


def test_logits_are_those_of_the_whole_batch():
    model = cases.dense_model()
    batch = torch.randint(3, model.config.vocab_size, (3, 7))
    with torch.no_grad():
        torch.testing.assert_close(logits_of(model, batch), model(input_ids=batch).logits)


def test_tokens_of_each_expert_are_counted(tmp_path):
    moe = cases.upcycled(tmp_path / "moe", cases.dense_model())
    with torch.no_grad():
        moe.model.layers[1].mlp.gate.weight.zero_()  # ties: always the same experts
    with tokens_per_expert(moe) as counts:
        logits_of(moe, torch.randint(3, 20, (3, 7)))
    assert sorted(counts) == ["model.layers.1.mlp.gate", "model.layers.2.mlp.gate"]
    assert sorted(counts["model.layers.1.mlp.gate"].tolist()) == [0, 0, 21, 21]
    assert int(counts["model.layers.2.mlp.gate"].sum()) == 42
    logits_of(moe, torch.randint(3, 20, (1, 7)))
    assert int(counts["model.layers.2.mlp.gate"].sum()) == 42
