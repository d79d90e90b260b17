"""Rows and positions of tokens, and noise that does not depend on the batch around a row."""

from __future__ import annotations

import threading

import pytest
import torch
from oracles.models import tiny_qwen, toy_batch, toy_model
from torch.nn.functional import pad

from bmoe_lightning.experts.threads import in_all_threads
from bmoe_lightning.routers import (
    TokenRows,
    find_routers,
    intercepted_routers,
    sample_noise,
    watched_tokens,
)
from recipes.supported_models.tiny import build


def noisy(watch, sample, scale=1.0):
    """Adds noise by position, as a method does."""

    def replace(router, _u, logits):
        positions = watch.rows(len(logits)).positions.flatten()
        length = int(positions.max()) + 1
        shape = (length, router.num_experts)
        (table,) = sample_noise(shape, seed=1, router=router.index, samples=[sample])
        return logits + scale * table[positions].to(logits)

    return replace


def last_logits(model, ids, mask, sample=0):
    """Logits at the last real token of each row, with noise."""
    with (
        torch.no_grad(),
        watched_tokens(model) as watch,
        intercepted_routers(model, find_routers(model), noisy(watch, sample)),
    ):
        output = model(input_ids=ids, attention_mask=mask)
    output = output if isinstance(output, torch.Tensor) else output.logits
    last = mask.shape[1] - 1 - mask.flip(1).argmax(1)
    return output[torch.arange(len(ids)), last]


class TestNoiseByPosition:
    @pytest.mark.parametrize("make", [toy_model, tiny_qwen])
    @pytest.mark.parametrize("side", ["left", "right"])
    def test_a_row_alone_in_a_batch_and_padded(self, make, side):
        model, batch = make(), toy_batch(pad=side)
        for sample in (0, 3):
            together = last_logits(model, batch["ids"], batch["mask"], sample)
            for row in range(len(together)):
                real = batch["mask"][row].bool()
                ids = batch["ids"][row : row + 1, real]
                alone = last_logits(model, ids, torch.ones_like(ids), sample)
                torch.testing.assert_close(alone[0], together[row], rtol=1e-5, atol=1e-6)
            pairs = [
                last_logits(model, batch["ids"][i : i + 2], batch["mask"][i : i + 2], sample) for i in range(0, 5, 2)
            ]
            torch.testing.assert_close(torch.cat(pairs), together, rtol=1e-5, atol=1e-6)
            wider = [pad(batch[name], (3, 0) if side == "left" else (0, 3)) for name in ("ids", "mask")]
            torch.testing.assert_close(last_logits(model, *wider, sample), together, rtol=1e-5, atol=1e-6)

    def test_it_matters(self):
        model, batch = toy_model(), toy_batch()
        first, second = (last_logits(model, batch["ids"], batch["mask"], sample) for sample in (0, 1))
        assert (first - second).abs().max() > 1e-2


class TestRows:
    @pytest.mark.parametrize(
        ("mask", "positions"),
        [([0, 0, 1, 1], [0, 0, 0, 1]), ([1, 1, 0, 0], [0, 1, 1, 1]), ([1, 1, 1, 1], [0, 1, 2, 3])],
    )
    def test_positions(self, mask, positions):
        rows = TokenRows.of_mask(torch.tensor([mask]))
        assert rows.positions.tolist() == [positions]
        assert rows.mask.tolist() == [list(map(bool, mask))]

    def test_behind_a_cache(self):
        rows = TokenRows.of_mask(torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]]), 1)
        assert rows.positions.tolist() == [[2], [3]]
        assert rows.mask.tolist() == [[True], [True]]

    def test_without_a_mask_all_are_real(self):
        model = tiny_qwen()
        with watched_tokens(model) as watch:
            model(torch.ones(2, 3, dtype=torch.int64))
        assert watch.rows(6).positions.tolist() == [[0, 1, 2]] * 2

    def test_a_mask_that_is_given_by_position(self):
        model, mask = tiny_qwen(), torch.tensor([[0, 1, 1], [1, 1, 1]])
        with watched_tokens(model) as watch:
            model(torch.ones(2, 3, dtype=torch.int64), mask)
        assert watch.rows(6).mask.tolist() == mask.bool().tolist()

    @pytest.mark.parametrize("kind", ["bool", "0 and 1", "positional"])
    def test_a_mask_of_another_name_is_refused(self, kind):
        class Own(torch.nn.Module):
            def forward(self, ids, valid=None, labels=None, attention_mask=None):
                return ids

        model, ids = Own(), torch.ones(2, 3, dtype=torch.int64)
        mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
        with watched_tokens(model) as watch:
            model(ids, labels=mask)
            assert watch.rows(6).mask.all()
            model(ids, valid=mask, attention_mask=mask)
            assert watch.rows(6).mask.tolist() == mask.bool().tolist()
            with pytest.raises(RuntimeError, match=r"called with 'valid'.*as the keyword attention_mask"):
                model(ids, mask) if kind == "positional" else model(ids, valid=mask.bool() if kind == "bool" else mask)

    def test_encoder_and_decoder(self):
        tiny = build("switch_transformers")
        with watched_tokens(tiny.model) as watch:
            tiny.class_logits(tiny.model, tiny.batches[1])
        assert watch.rows(10).mask.tolist() == tiny.batches[1]["attention_mask"].bool().tolist()
        assert watch.rows(6).mask.tolist() == [[True] * 3] * 2
        watch.begin(TokenRows.of_mask(torch.tensor([[0, 1]])), TokenRows.of_mask(torch.tensor([[1, 1]])))
        with pytest.raises(RuntimeError, match="two inputs of the model have as many with different padding"):
            watch.rows(2)

    def test_tokens_that_are_in_no_known_row(self):
        model = toy_model()
        with watched_tokens(model) as watch:
            with pytest.raises(RuntimeError, match="got 6 tokens, and the model was called with no known tokens"):
                watch.rows(6)
            model(input_ids=torch.ones(2, 3, dtype=torch.int64), attention_mask=torch.ones(2, 3, dtype=torch.int64))
            with pytest.raises(RuntimeError, match="got 7 tokens, and the model was called with 2 x 3 tokens"):
                watch.rows(7)

    def test_calls_of_other_threads_are_not_seen(self):
        model = tiny_qwen()
        hooks = len(model._forward_pre_hooks)
        with watched_tokens(model) as watch:
            model(torch.ones(2, 3, dtype=torch.int64))
            thread = threading.Thread(target=lambda: model(torch.ones(1, 4, dtype=torch.int64)))
            thread.start()
            thread.join()
            assert watch.rows(6).mask.shape == (2, 3)
        assert len(model._forward_pre_hooks) == hooks


class TestSeveralCallsBeforeOneBackwardPass:
    """Gradients with recomputed activations are those with stored ones, whatever the padding of each call."""

    IDS = torch.arange(2, 14).view(2, 6)
    MASKS = ([[0, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1]], [[1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1]])

    def loss(self, model, watch_of):
        """Two calls of as many tokens; `watch_of` enters their context."""
        with watch_of() as watch, intercepted_routers(model, find_routers(model), self.noisy(watch), everywhere=True):
            total = sum(
                model(input_ids=self.IDS, attention_mask=torch.tensor(mask)).logits[:, -1, :4].logsumexp(1).sum()
                for mask in self.MASKS
            )
            total.backward()
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    def noisy(self, watch):
        def replace(router, u, logits):
            rows = watch.rows(len(logits), router, u)
            (table,) = sample_noise((6, router.num_experts), seed=1, router=router.index, samples=[0])
            return logits + table[rows.positions.flatten()].to(logits) * rows.mask.flatten().unsqueeze(1)

        return replace

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_gradients(self, reentrant):
        found = []
        for checkpoints in (False, True):
            model = tiny_qwen().train()
            if checkpoints:
                model.gradient_checkpointing_enable({"use_reentrant": reentrant})
                model.enable_input_require_grads()
            with in_all_threads():
                found.append(self.loss(model, lambda model=model: watched_tokens(model)))
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)

    def test_calls_whose_graph_is_gone_are_forgotten(self):
        model = tiny_qwen().train()
        with watched_tokens(model) as watch:
            kept = [model(input_ids=self.IDS[:, :length]).logits for length in (3, 4, 5)]
            assert watch.rows(6).mask.shape == (2, 3)
            with torch.no_grad():
                model(input_ids=self.IDS)
            assert watch.rows(8).mask.shape == (2, 4)
            del kept[0]
            with pytest.raises(RuntimeError, match="called with 2 x 4 and 2 x 5 tokens"):
                watch.rows(6)

    def test_several_calls_that_cannot_be_told_apart(self):
        model = tiny_qwen().train()
        with watched_tokens(model) as watch:
            kept = [model(input_ids=self.IDS, attention_mask=torch.tensor(mask)).logits for mask in self.MASKS]
            with pytest.raises(RuntimeError, match="after several calls of the model"):
                watch.rows(12)
        assert len(kept) == 2

    def test_two_calls_of_one_batch(self):
        model, seen = tiny_qwen(), []

        def look(router, u, logits):
            seen.append(watch.rows(len(logits), router, u).mask.tolist())
            return logits

        with watched_tokens(model) as watch, intercepted_routers(model, find_routers(model), look):
            for mask in self.MASKS:
                model(input_ids=self.IDS, attention_mask=torch.tensor(mask))
        expected = [[list(map(bool, row)) for row in mask] for mask in self.MASKS]
        assert seen == [mask for mask in expected for _ in find_routers(model)]


def test_tokens_of_a_row_that_several_sequences_share():
    # Two tokens of a prompt, two choices of one token each, and padding on the left.
    sees = torch.eye(5, dtype=torch.bool).repeat(1, 1, 1, 1)
    sees[0, 0, 2:, 1] = sees[0, 0, 3:, 2] = True
    positions = torch.tensor([[7, 0, 1, 2, 2]])
    for attention in (sees, torch.zeros(sees.shape).masked_fill(~sees, -1e9)):
        rows = TokenRows.of_attention(attention, positions)
        assert rows.mask.tolist() == [[False, True, True, True, True]]
        assert rows.positions.tolist() == [[0, 0, 1, 2, 2]]
        assert rows.last is None  # the end of the prompt, or of either choice

    class Packed(torch.nn.Module):
        def forward(self, input_ids, attention_mask, position_ids):
            seen.append(watch.rows(5))
            return input_ids

    model, seen = Packed(), []
    with watched_tokens(model) as watch:
        model(input_ids=torch.ones(1, 5, dtype=torch.int64), attention_mask=sees, position_ids=positions)
    assert torch.equal(seen[0].positions, rows.positions)
