"""Records of data sets: what they tell apart, and what makes no difference."""

from __future__ import annotations

import copy

import pytest
import torch
from forked_processes import run
from oracles.models import answer_logits, toy_batch, toy_model

from bmoe_lightning.experts import data_record, row_matching
from bmoe_lightning.experts.data_record import (
    FIRST,
    DataRecord,
    DataRecorder,
    compared,
    compared_in_any_order,
    record_of,
)
from bmoe_lightning.experts.logits_contract import NO_LABEL


def data(size=200, seed=0, num_classes=4, scale=2.0, ragged=False):
    """Logits with a common offset, as of a token head, and labels drawn from them."""
    generator = torch.Generator().manual_seed(seed)
    logits = 10 + scale * torch.randn(size, num_classes, generator=generator, dtype=torch.float64)
    if ragged:
        logits[::3, -1] = -torch.inf
    labels = torch.multinomial((logits - 10).softmax(-1), 1, generator=generator).squeeze(1)
    return logits, labels


def recorded(logits, labels, sizes=(200,), **options):
    recorder = DataRecorder(**options)
    for part, of_part in zip(logits.split(list(sizes)), labels.split(list(sizes)), strict=True):
        recorder.add(part, of_part, len(part))
    return recorder.finish()


def shuffled(logits, labels, seed=5):
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    return logits[order], labels[order]


def rounded(logits, labels):
    """Logits from a model in bfloat16: with rounding in every layer, and one other expert chosen."""
    noise = torch.randn(logits.shape, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    noisy = (logits + 0.06 * noise).to(torch.bfloat16).double()
    noisy[7] += torch.tensor([0.4, -0.4, 0, 0])
    return noisy, labels


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("change", [lambda *x: x, shuffled, rounded, lambda *x: rounded(*shuffled(*x))])
def test_the_same_data(ragged, change):
    logits, labels = data(ragged=ragged)
    record, other = record_of(logits, labels), record_of(*change(logits, labels))
    assert record.difference(other) == other.difference(record) == ""
    assert record.beginning(other) in ("", None)


@pytest.mark.parametrize("scale", [0.05, 2.0, 40.0])
@pytest.mark.parametrize("size", [30, 200, 3000])
def test_other_examples_of_the_same_distribution(size, scale):
    """Also where they have the same labels."""
    logits, labels = data(size, scale=scale)
    other = data(size, seed=1, scale=scale)[0]
    for change in (lambda *x: x, shuffled):
        found = record_of(*change(other, labels))
        assert record_of(logits, labels).difference(found) == "other inputs (the model's logits differ)"
    assert record_of(logits, labels).beginning(found) is None


def test_another_number_of_examples():
    logits, labels = data()
    for size in (150, 199):
        assert record_of(logits, labels).difference(record_of(logits[:size], labels[:size])) == (
            f"{size} examples instead of 200"
        )


def test_other_labels():
    logits, labels = data()
    changed = labels.clone()
    changed[:3] = (labels[:3] + 1) % 4
    for change in (lambda *x: x, shuffled):
        said = record_of(logits, labels).difference(record_of(*change(logits, changed)))
        assert said.startswith("other labels (")
        assert " of label " in said
    # As many of each label.
    permuted = labels[torch.randperm(200, generator=torch.Generator().manual_seed(1))]
    first = permuted.clone()
    first[FIRST:] = labels[FIRST:]
    said = record_of(logits, labels).difference(record_of(*shuffled(logits, permuted)))
    assert said == "other inputs (the model's logits differ)"  # no example is known by its logits alone
    assert compared((logits, labels), (logits, first)).startswith("other labels (of ")


def test_single_examples_in_the_same_order():
    logits, labels = data()
    others = logits.clone()
    others[150] = logits[3]
    assert compared((logits, labels), (others, labels)) == (
        "other inputs (the model's logits differ for 1 of 200 examples)"
    )
    absent = logits.clone()
    absent[150, 2] = -torch.inf
    assert "1 of 200" in compared((logits, labels), (absent, labels))
    assert compared((logits, labels), shuffled(logits, labels)) is None


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("change", [shuffled, lambda *x: rounded(*shuffled(*x)), lambda *x: (x[0], None)])
def test_all_examples_in_any_order(ragged, change):
    logits, labels = data(ragged=ragged)
    found, found_labels = change(logits, labels)
    bare = torch.full((200,), NO_LABEL)
    other = (found, bare if found_labels is None else found_labels)
    assert compared_in_any_order((logits, labels), other) == compared_in_any_order(other, (logits, labels)) == ""


def test_single_examples_in_another_order():
    logits, labels = data()
    found, found_labels = shuffled(logits, labels)
    known = (logits, labels)
    assert compared_in_any_order(known, (found[:199], found_labels[:199])) == "199 examples instead of 200"
    others = found.clone()
    others[::20] = data(seed=1)[0][::20]
    said = compared_in_any_order(known, (others, found_labels))
    assert said == "other inputs (the model's logits differ for 10 of 200 examples)"
    # With rounding that allows for 3 % of other experts, more have to differ.
    rounded_others = rounded(others, found_labels)
    assert compared_in_any_order(known, rounded_others).startswith("other inputs (the model's logits differ for ")
    one, other = (int((found_labels == label).nonzero()[0]) for label in (0, 1))
    swapped = found_labels.clone()
    swapped[one], swapped[other] = 1, 0
    assert compared_in_any_order(known, (found, swapped)) == "other labels (of 2 of 200 examples)"
    swapped[one] = 0
    assert compared_in_any_order(known, (found, swapped)).startswith("other labels (")
    absent = found.clone()
    absent[150, 2] = -torch.inf
    assert "1 of 200" in compared_in_any_order(known, (absent, found_labels))


def test_labels_may_be_unknown_on_one_side():
    logits, labels = data()
    bare = record_of(logits, None)
    assert record_of(logits, labels).difference(bare) == bare.difference(record_of(logits, labels)) == ""
    assert bare.difference(record_of(data(seed=1)[0], labels)) == "other inputs (the model's logits differ)"
    for placeholders in (torch.full((200,), -100), labels.double(), torch.zeros(200, 4), "none"):
        assert record_of(logits, placeholders).difference(bare) == ""


def test_examples_that_are_all_alike():
    logits = torch.ones(20, 3, dtype=torch.float64)
    labels = torch.arange(20) % 3
    assert record_of(logits, labels).difference(record_of(logits + 1e-7, labels)) == ""
    assert record_of(logits[:1], labels[:1]).difference(record_of(logits[:1], labels[:1])) == ""


@pytest.mark.parametrize("sizes", [(200,), (1, 63, 136), (70, 130), (0, 200)])
def test_batch_sizes_make_no_difference(sizes):
    logits, labels = data(ragged=True)
    whole, parts = recorded(logits, labels), recorded(logits, labels, sizes)
    for name, value in whole.tensors().items():
        torch.testing.assert_close(parts.tensors()[name], value, equal_nan=True)


def test_classes_that_only_later_batches_have():
    logits, labels = data(ragged=True)
    recorder = DataRecorder()
    rows = torch.arange(200)
    narrow = rows % 3 == 0
    recorder.add(logits[narrow][:, :3], labels[narrow], int(narrow.sum()))
    recorder.add(logits[~narrow], labels[~narrow], int((~narrow).sum()))
    order = torch.cat([rows[narrow], rows[~narrow]])
    expected = record_of(logits[order], labels[order])
    for name, value in expected.tensors().items():
        torch.testing.assert_close(recorder.finish().tensors()[name], value, equal_nan=True)


def test_only_counted_examples():
    logits, labels = data()
    recorder = DataRecorder()
    recorder.add(logits, labels, 150)
    recorder.add(logits, labels, 0)
    assert recorder.finish().difference(record_of(logits[:150], labels[:150])) == ""
    assert recorder.finish().num_examples == 150


@pytest.mark.parametrize("within", [(True, False, False), (False, True, False), (False, False, True)])
def test_inference_mode_makes_no_difference(within):
    logits, labels = data()
    made, added, finished = within
    with torch.inference_mode(made):
        recorder = DataRecorder()
    with torch.inference_mode(added):
        recorder.add(logits[:90].clone(), labels[:90].clone(), 90)
    recorder.add(logits[90:], labels[90:], 110)
    with torch.inference_mode(finished):
        record = recorder.finish()
    assert record.difference(record_of(logits, labels)) == ""


def test_state_survives_and_is_checked():
    logits, labels = data()
    whole = recorded(logits, labels, max_batches=5)
    killed = DataRecorder(max_batches=5)
    killed.add(logits[:40], labels[:40], 40)
    again = DataRecorder(max_batches=5)
    again.load_state(killed.state())
    again.add(logits[40:], labels[40:], 160)
    found = again.finish()
    assert found.max_batches == 5
    for name, value in whole.tensors().items():
        torch.testing.assert_close(found.tensors()[name], value, equal_nan=True)
    of_earlier_version = DataRecorder()
    of_earlier_version.load_state({})
    of_earlier_version.add(logits, labels, 200)
    assert of_earlier_version.finish() is None
    assert of_earlier_version.state() == {}
    for wrong in ({"counts": whole.counts}, {**killed.state(), "sums": whole.sums.float()}):
        with pytest.raises(ValueError, match="record of"):
            DataRecorder().load_state(wrong)


@pytest.mark.parametrize(
    "change",
    [
        {"counts": torch.tensor([-1, 0, 0, 0, 0])},
        {"sums": torch.full((5, 8), torch.nan, dtype=torch.float64)},
        {"squares": torch.full((8,), -1.0, dtype=torch.float64)},
        {"labels": torch.zeros(3, dtype=torch.int64)},
        {"limits": torch.zeros(2)},
    ],
)
def test_tensors_of_no_record_are_refused(change):
    tensors = record_of(*data()).tensors()
    assert DataRecord.from_tensors(tensors).difference(record_of(*data())) == ""
    with pytest.raises(ValueError, match="record of data"):
        DataRecord.from_tensors({**tensors, **change})
    with pytest.raises(ValueError, match="lacks"):
        DataRecord.from_tensors({name: value for name, value in tensors.items() if name not in change})


def in_shards(rank, world_size):
    logits, labels = data(ragged=True)
    mine, own = logits[rank::world_size], labels[rank::world_size]
    if rank == 0:
        mine, own = mine.clone(), own.clone()
    recorder = DataRecorder(distributed=True)
    for part, of_part in zip(mine.split(9), own.split(9), strict=True):
        recorder.add(part, of_part, len(part))
    found, expected = recorder.finish().tensors(), record_of(logits, labels).tensors()
    assert found.pop("limits").tolist() == [world_size, -1]
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], equal_nan=True)
    few = DataRecorder(distributed=True)
    if rank:
        few.add(logits[:0], labels[:0], 0)
    else:
        few.add(logits[:1], labels[:1], 1)
    record = few.finish()
    assert record.num_examples == 1
    assert record.labels.tolist() == [int(labels[0])] + [NO_LABEL] * (FIRST - 1)
    assert record_of(logits, labels).beginning(record) == ""
    incomplete = DataRecorder(distributed=True)
    if rank:
        incomplete.load_state({})
    assert incomplete.finish() is None


@pytest.mark.parametrize("world_size", [2, 3])
def test_shards_of_several_ranks(world_size, tmp_path):
    run(in_shards, world_size, tmp_path)


@pytest.mark.parametrize("num_layers", [1, 2, 4])
def test_limits_are_apart_from_rounding_and_from_other_inputs(num_layers):
    """Of the largest difference of a centred logit, in units of the spread between examples."""
    model, batch = toy_model(num_layers=num_layers), toy_batch(num_rows=400, seed=3)

    def centred(model, batch):
        logits = answer_logits(model, batch)[0].detach().double()
        return logits - logits.mean(1, keepdim=True)

    known = centred(model, batch)
    spread = known.std(0).square().mean().sqrt()
    in_bfloat16, in_float32, of_others = (
        (known - found).abs().amax(1) / spread
        for found in (
            centred(copy.deepcopy(model).bfloat16(), batch),
            centred(copy.deepcopy(model).float(), batch),
            centred(model, toy_batch(num_rows=400, seed=9)),
        )
    )
    assert float(in_bfloat16.median()) < data_record._ALIGNED / 5
    assert float((in_bfloat16 > data_record._SAME_EXAMPLE).double().mean()) < data_record._REROUTED / 2
    assert float(in_float32.median()) < row_matching._IDENTICAL / 20
    assert float(in_float32.max()) < data_record._EXACT / 10 < row_matching._TIGHT / 10
    assert float(in_bfloat16.median()) > 10 * data_record._EXACT  # the two are told apart
    assert float(of_others.median()) > 3 * data_record._SAME_EXAMPLE
    assert float((of_others < data_record._SAME_EXAMPLE).double().mean()) < 0.06


def test_nothing_is_copied_to_the_host_before_the_end():
    """On a device without values every copy would be an error."""
    logits, labels = data()
    recorder = DataRecorder()
    for start in (0, 50, 100):
        recorder.add(logits[start : start + 50].to("meta"), labels[start : start + 50].to("meta"), 40)
    assert {value.device.type for value in recorder.state().values()} == {"meta"}
    assert recorder.state()["counts"].shape == (5,)


def test_a_record_that_resumes_on_another_device():
    logits, labels = data()
    recorder = DataRecorder()
    recorder.add(logits[:30], labels[:30], 30)
    resumed = DataRecorder()
    resumed.load_state(recorder.state())
    resumed.add(logits[30:].to("meta"), labels[30:].to("meta"), 170)
    assert {value.device.type for value in resumed.state().values()} == {"meta"}
