"""The contract of `class_logits`."""

from __future__ import annotations

import pytest
import torch

from bmoe_lightning.experts.logits_contract import (
    NO_LABEL,
    check_logits,
    checked_labels,
    joined_logits,
    looks_masked,
    masked_logits,
    present_classes,
    run_class_logits,
)

LOGITS = torch.tensor([[1.0, 2.0, 3.0], [3.0, 1.0, -torch.inf]])
INF = torch.inf


class TestLogits:
    def test_good_ones_are_not_mistaken(self):
        check_logits(torch.tensor([[0.2, 0.8], [0.9, 0.9]]))  # one row is no distribution
        check_logits(torch.tensor([[0.2, 0.8003]]))  # nearly one, by chance
        check_logits(torch.tensor([[0.5, 0.5, 0.0]]).log())
        check_logits(torch.tensor([[1.0, -INF, 0.0], [2.0, 3.0, -INF]]))
        check_logits(torch.randn(3, 4).log_softmax(-1))
        check_logits(torch.empty(0, 3))
        check_logits(torch.tensor([[800.0, 0.0, -800.0]]))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
    def test_probabilities_are_refused_in_any_dtype(self, dtype):
        generator = torch.Generator().manual_seed(0)
        probabilities = torch.randn(16, 3, generator=generator).softmax(-1).to(dtype)
        with pytest.raises(ValueError, match="returned probabilities"):
            check_logits(probabilities)

    def test_one_row_of_probabilities_is_refused(self):
        with pytest.raises(ValueError, match="returned probabilities"):
            check_logits(torch.randn(1, 4).softmax(-1))

    @pytest.mark.parametrize("found", [None, LOGITS, (LOGITS,), (LOGITS, None, None), {"logits": LOGITS}])
    def test_anything_but_a_pair_is_refused(self, found):
        with pytest.raises(TypeError, match=r"must return \(logits, labels or None\)"):
            run_class_logits(lambda *_: found, None, None)

    def test_logits_are_a_tensor(self):
        with pytest.raises(TypeError, match="as a tensor, got list"):
            run_class_logits(lambda *_: (LOGITS.tolist(), None), None, None)


class TestAbsentClasses:
    @pytest.mark.parametrize(
        ("mask", "dtype"),
        [
            (-INF, torch.float32),
            (torch.finfo(torch.float16).min, torch.float16),
            (torch.finfo(torch.bfloat16).min, torch.bfloat16),
            (torch.finfo(torch.float32).min, torch.float32),
            (torch.finfo(torch.float64).min, torch.float64),
            (-1e9, torch.float32),
            (-1e4, torch.float32),
            (-1e4, torch.float16),
            (-1e4, torch.bfloat16),
        ],
    )
    @pytest.mark.parametrize("added", [False, True])
    def test_every_usual_mask_is_one(self, mask, dtype, added):
        values = torch.tensor([[30.0, -60.0, 5.0], [-40.0, 2.0, 60.0]], dtype=dtype)
        absent = torch.tensor([[False, False, True], [True, False, False]])
        masked = values + absent.to(dtype) * max(mask, torch.finfo(dtype).min) if added else values.clone()
        masked = masked if added else masked.masked_fill(absent, mask)
        assert torch.equal(present_classes(masked), ~absent)
        expected = values.double().masked_fill(absent, -INF)
        torch.testing.assert_close(masked_logits(masked), expected, rtol=0, atol=0)

    @pytest.mark.parametrize("lowest", [-100.0, -1000.0, -4000.0])
    def test_real_logits_are_none(self, lowest):
        """Sums of log-probabilities over long answers, say."""
        assert bool(present_classes(torch.tensor([[0.0, lowest]])).all())

    def test_a_class_that_all_but_one_are_far_below(self):
        with pytest.raises(ValueError, match=r"fewer than two classes.*5000 below"):
            check_logits(torch.tensor([[1e5, 0.0, 3.0]]))

    def test_a_mask_that_is_read_as_a_logit_is_noticed(self):
        values = torch.randn(4, 3)
        assert looks_masked(values) is None
        assert looks_masked(values.index_fill(1, torch.tensor([2]), -100)) == -100
        assert looks_masked(values.index_fill(1, torch.tensor([2]), -1e4)) is None
        assert looks_masked(200 * values) is None  # far apart, but no two are the same


class TestLabels:
    def test_good_ones_become_int64(self):
        for dtype in (torch.int64, torch.int32, torch.uint8):
            found = checked_labels(torch.tensor([2, 1], dtype=dtype), LOGITS)
            assert found.dtype == torch.int64
            assert found.tolist() == [2, 1]

    @pytest.mark.parametrize(
        ("labels", "message"),
        [
            (torch.tensor([0.0, 1.0]), r"as torch\.float32; return class indices as integers"),
            (torch.tensor([True, False]), r"as torch\.bool"),
            ([0, 1], "as a list; return a tensor"),
            (torch.eye(3)[:2], r"look one-hot.*argmax\(-1\)"),
            (torch.eye(3)[:2].bool(), "look one-hot"),
            (torch.tensor([0]), r"logits \(2, 3\) and labels \(1,\); return one row"),
            (torch.tensor([[0], [1]]), r"labels \(2, 1\)"),
            (torch.tensor(1), r"labels \(\)"),
            (torch.tensor([-100, 1]), "labels -100 for K = 3 classes; leave unlabelled examples out"),
            (torch.tensor([3, 1]), "labels 3 for K = 3 classes; they seem to be counted from 1"),
            (torch.tensor([3, 0]), "labels 3 for K = 3 classes; return class indices 0 to K - 1"),
            (torch.tensor([7, 1]), "labels 7 for K = 3"),
            (torch.tensor([NO_LABEL, 1]), "for some batches and None for others"),
            (torch.tensor([0, 2]), "1 labels name a class that their example does not have.*example 1"),
        ],
    )
    def test_bad_ones_are_refused(self, labels, message):
        with pytest.raises(ValueError, match=message):
            checked_labels(labels, LOGITS)

    def test_unused_ones_may_be_placeholders_of_the_right_kind(self):
        assert checked_labels(torch.tensor([-100, 9]), LOGITS, values=False).tolist() == [-100, 9]
        with pytest.raises(ValueError, match="as a list"):
            checked_labels([0, 1], LOGITS, values=False)

    def test_a_label_of_a_class_with_a_finite_mask(self):
        with pytest.raises(ValueError, match="does not have"):
            checked_labels(torch.tensor([2]), torch.tensor([[0.0, 1.0, -1e4]]))


class TestBatch:
    def test_a_popped_label_is_there_the_next_time(self):
        batch = {"labels": torch.tensor([0, 1])}
        for _ in range(2):
            assert run_class_logits(lambda _, b: (LOGITS, b.pop("labels")), None, batch)[1].tolist() == [0, 1]

    def test_a_write_to_the_batch_is_refused(self):
        def class_logits(_, batch):
            batch["ids"].clamp_(max=1)
            return LOGITS, None

        with pytest.raises(RuntimeError, match=r"class_logits writes in place to batch\['ids'\]"):
            run_class_logits(class_logits, None, {"ids": torch.arange(3)})


def test_batches_of_different_k_are_joined_with_absent_classes():
    found = joined_logits([torch.zeros(1, 2), torch.ones(2, 3), torch.empty(0, 2)], 4)
    assert found.tolist() == [[0, 0, -INF, -INF], [1, 1, 1, -INF], [1, 1, 1, -INF]]
