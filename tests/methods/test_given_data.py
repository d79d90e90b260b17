"""Methods that are added to a fit get the data of that fit: the same in any order, and no others."""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from forked_processes import run
from given_data_cases import (
    HELD_OUT,
    MODEL,
    OTHER,
    OTHERS,
    TRAINING,
    UNKNOWN,
    VARYING,
    Loader,
    batches,
    exchanged,
    fit,
    padded,
    part_of,
    relabelled,
    replaced,
    shuffled,
    swapped,
)
from methods_cases import RANK3
from oracles.models import answer_logits, taken, toy_batch, toy_model
from torch.utils.data import DataLoader

from bmoe_lightning.experts import row_matching
from bmoe_lightning.methods import (
    MAP,
    EvidenceTemperature,
    LaplaceEvidence,
    LaplaceLPO,
    LaplaceTemperature,
    TemperatureScaling,
    fit_methods,
)
from bmoe_lightning.methods.data_differences import DataMismatchError
from bmoe_lightning.methods.given_data import GivenData
from bmoe_lightning.methods.storage import load_fit, save_fit
from bmoe_lightning.methods.training_data import Batches


@pytest.fixture(scope="module")
def in_memory():
    return fit([MAP(), LaplaceLPO(num_samples=200)])


@pytest.fixture(scope="module")
def existing(in_memory, tmp_path_factory):
    """As another process reads it."""
    folder = tmp_path_factory.mktemp("fit")
    save_fit(folder, in_memory)
    return load_fit(folder)[0]


ADDED = {
    "without covariances": TemperatureScaling(),
    "with covariances": LaplaceTemperature(prior_mean="zero", num_samples=100),
    "without labels": EvidenceTemperature(prior_mean="zero"),
    "with another curvature": LaplaceLPO(name="other", curvature=OTHER, num_samples=100),
    "nothing": MAP(),
}


@pytest.mark.parametrize("added", list(ADDED.values()), ids=list(ADDED))
@pytest.mark.parametrize(
    ("data", "said"),
    [
        (relabelled(HELD_OUT, 100), r"other labels \(of 1 of 112 examples\)"),
        (taken(HELD_OUT, slice(0, 111)), "111 examples instead of 112"),
        (toy_batch(num_rows=112, seed=9), r"other (labels|inputs) \("),
        (shuffled(relabelled(HELD_OUT, 100)), r"other labels \("),
        ({**toy_batch(num_rows=112, seed=9), "labels": HELD_OUT["labels"]}, r"other inputs \("),
        (shuffled(replaced(HELD_OUT, 40, 50, 111)), r"other inputs \(.* for 3 of 112 examples\)"),
        (shuffled(swapped(HELD_OUT)), r"other labels \(of 2 of 112 examples\)"),
    ],
)
def test_another_calibration_split_is_refused(existing, in_memory, added, data, said):
    methods = [LaplaceLPO(num_samples=200), added]
    for earlier in (existing, in_memory):
        with pytest.raises(DataMismatchError, match=OTHERS.format("held-out", said)):
            fit(methods, held_out=data, earlier=earlier)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (taken(TRAINING, slice(0, 79)), "79 examples instead of 80"),
        (taken(TRAINING, slice(0, 40)), "40 examples instead of 80"),
        (relabelled(TRAINING, 3), r"other labels \(of 1 of 40 examples\)"),
        (toy_batch(num_rows=80, seed=9), r"other (labels|inputs) \("),
        ({**toy_batch(num_rows=80, seed=9), "labels": TRAINING["labels"]}, r"other inputs \("),
    ],
)
@pytest.mark.parametrize(
    "added", [LaplaceEvidence(prior_mean="zero"), LaplaceLPO(name="other", curvature=OTHER), MAP()]
)
def test_other_training_data_are_refused(existing, added, data, said):
    """Whether the curvature is shared, collected anew, or nothing is missing."""
    with pytest.raises(DataMismatchError, match=OTHERS.format("training", said)):
        fit([LaplaceLPO(num_samples=200), added], training=data, earlier=existing)


@pytest.mark.parametrize("data", [relabelled(TRAINING, 70), shuffled(relabelled(TRAINING, 70))])
def test_a_new_curvature_pass_compares_every_example(existing, data):
    added = LaplaceLPO(name="other", curvature=OTHER)
    for given in (batches(data), iter(batches(data))):
        with pytest.raises(DataMismatchError, match=OTHERS.format("training", "other labels")):
            fit([added], training=given, earlier=existing)


@pytest.mark.parametrize("added", list(ADDED.values()), ids=list(ADDED))
@pytest.mark.parametrize("change", [shuffled, padded], ids=["in another order", "padded"])
def test_the_same_data_are_accepted(existing, added, change):
    methods = [LaplaceLPO(num_samples=200), added]
    found = fit(methods, change(TRAINING), change(HELD_OUT), existing, size=13)
    if added.name != "map":
        expected = fit(methods, earlier=existing)
        for key, value in expected.methods[added.name].state.items():
            torch.testing.assert_close(found.methods[added.name].state[key], value, rtol=0.02, atol=0)
    assert found.calibration is existing.calibration
    assert found.training is existing.training


@pytest.mark.parametrize("added", list(ADDED.values()), ids=list(ADDED))
def test_held_out_data_of_which_two_changed_places(existing, added):
    fit([LaplaceLPO(num_samples=200), added], held_out=exchanged(HELD_OUT), earlier=existing, size=20)


def test_a_model_in_half_precision_sees_the_same_data(existing):
    """Its logits differ by rounding; the record is of the float64 model."""
    half = toy_model(num_layers=1).float().bfloat16()

    def in_half(model, batch):
        logits, labels = answer_logits(half, batch)
        return logits.float(), labels

    added = [TemperatureScaling(), LaplaceLPO(num_samples=200)]
    for data in (batches(HELD_OUT), batches(shuffled(HELD_OUT), 20)):
        assert fit_methods(
            [method.with_defaults(RANK3) for method in added], MODEL, in_half, batches(TRAINING), data, earlier=existing
        ).methods.keys() == {"laplace_lpo", "temperature"}


def test_a_loader_that_shuffles_anew_each_time(existing):
    rows = [taken(TRAINING, [row]) for row in range(80)]
    stack = {"batch_size": 8, "collate_fn": lambda found: {k: torch.cat([x[k] for x in found]) for k in found[0]}}
    loader = DataLoader(rows, shuffle=True, generator=torch.Generator().manual_seed(3), **stack)
    state = loader.generator.get_state()
    fit([LaplaceEvidence(prior_mean="zero")], training=loader, earlier=existing)
    assert torch.equal(loader.generator.get_state(), state)
    fit([LaplaceEvidence(prior_mean="zero", curvature=OTHER)], training=loader, earlier=existing)


@pytest.mark.parametrize("added", [TemperatureScaling(), LaplaceEvidence(prior_mean="zero", curvature=OTHER)])
@pytest.mark.parametrize("name", list(VARYING))
def test_data_that_differ_in_every_pass_are_not_refused(existing, in_memory, added, name, caplog):
    """Nobody can tell whether they are the same; it is said once, and nothing of the fit is lost."""
    np.random.seed(1)  # by chance two passes draw the same, and are taken for data that do not vary
    torch.manual_seed(1)
    loader = VARYING[name]()
    first = existing if name == "another order" else fit([MAP(), LaplaceLPO(num_samples=200)], training=loader)
    random = np.random.get_state()[1].copy()
    caplog.clear()
    with caplog.at_level(logging.WARNING, "bmoe_lightning"):
        found = fit([LaplaceLPO(num_samples=200), added], training=loader, earlier=first)
    assert added.name in found.methods
    said = [r for r in caplog.records if r.getMessage().startswith(UNKNOWN)]
    if not added.curvatures:
        assert np.array_equal(np.random.get_state()[1], random)
    if name == "another order":  # which the curvature pass compares
        assert len(said) == (0 if added.curvatures else 1)
    else:
        assert len(said) <= 1


def test_a_pass_over_varying_data_is_not_made_for_a_method_without_curvature(existing):
    loader = Loader(lambda: part_of(TRAINING, 64))
    fit([LaplaceLPO(num_samples=200), TemperatureScaling()], training=loader, earlier=existing)
    assert loader.passes == 2  # of which only the first batch is read


def test_another_order_is_compared_by_the_curvature_pass_alone(existing, monkeypatch):
    passed = []
    monkeypatch.setattr(GivenData, "_passed_over_training", lambda *_: passed.append(1))
    fit([LaplaceEvidence(prior_mean="zero", curvature=OTHER)], training=shuffled(TRAINING), earlier=existing)
    assert not passed


def test_other_data_are_refused_in_an_order_that_varies(existing):
    others = toy_batch(num_rows=80, seed=9)
    with pytest.raises(DataMismatchError, match="the training data are not those of the existing fit: other"):
        fit(
            [LaplaceEvidence(prior_mean="zero", curvature=OTHER)],
            training=Loader(lambda: part_of(others, 80)),
            earlier=existing,
        )


@pytest.mark.parametrize("added", [TemperatureScaling(), LaplaceEvidence(prior_mean="zero", curvature=OTHER)])
@pytest.mark.parametrize("kind", ["held-out", "training"])
def test_too_many_in_another_order_are_not_refused(existing, added, kind, caplog, monkeypatch):
    """Nobody can tell whether they are the same, and it is said once."""
    others = Loader(lambda: part_of(toy_batch(num_rows=80, seed=9), 80))
    data = {"held_out": shuffled(HELD_OUT)} if kind == "held-out" else {"training": others}
    monkeypatch.setattr(row_matching, "MAX_WORK", 0)
    with caplog.at_level(logging.WARNING, "bmoe_lightning"):
        found = fit([LaplaceLPO(num_samples=200), added], earlier=existing, **data)
    assert added.name in found.methods
    said = [r.getMessage() for r in caplog.records if f"whether the {kind} data are those of" in r.getMessage()]
    if kind == "held-out" or added.curvatures:
        assert "too many to be compared in any order" in said[0]
    assert len(said) == 1


def test_a_stream_that_only_a_comparison_would_read(existing, caplog):
    for data, known in ((TRAINING, True), (toy_batch(num_rows=80, seed=9), False)):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "bmoe_lightning"):
            fit([LaplaceLPO(num_samples=200), TemperatureScaling()], training=iter(batches(data)), earlier=existing)
        assert any("they can be read only once" in r.getMessage() for r in caplog.records) != known


def test_data_that_no_method_uses_are_not_looked_at(existing, in_memory):
    class Untouchable:
        def __iter__(self):
            raise AssertionError("looked at")

    with_temperature = fit([TemperatureScaling()], training=Untouchable())
    assert with_temperature.training is None
    added = LaplaceEvidence(prior_mean="zero")
    completed = fit([added], held_out=Untouchable(), earlier=with_temperature)
    assert completed.training.difference(in_memory.training) == ""
    fit([added], training=[], held_out=None, earlier=existing)  # none were given
    fit([TemperatureScaling()], training=Untouchable(), held_out=None, earlier=existing)


def test_labels_may_come_later():
    bare = {name: value for name, value in HELD_OUT.items() if name != "labels"}
    first = fit([EvidenceTemperature(prior_mean="zero")], held_out=bare)
    assert first.calibration[1] is None
    then = fit([TemperatureScaling()], earlier=first)
    assert torch.equal(then.calibration[1], HELD_OUT["labels"])
    with pytest.raises(DataMismatchError, match="other inputs"):
        fit([TemperatureScaling()], held_out={**toy_batch(num_rows=112, seed=9)}, earlier=first)
    with pytest.raises(ValueError, match="held-out labels are needed"):
        fit([TemperatureScaling(name="again")], held_out=bare, earlier=then)


def test_a_part_of_the_data(in_memory):
    """With `max_batches` the first pass saw a part, in an order that decides which."""
    capped, whole = replace(RANK3, max_batches=1), LaplaceEvidence(prior_mean="zero", name="whole", curvature=OTHER)
    other_rank = LaplaceEvidence(prior_mean="zero", name="other", curvature=replace(capped, rank=2))
    first = fit([LaplaceEvidence(prior_mean="zero", curvature=capped)])
    assert first.training.max_batches == 1
    assert fit([whole, other_rank], earlier=first).methods.keys() == {"laplace_evidence", "whole", "other"}
    for added in (whole, other_rank):
        with pytest.raises(DataMismatchError, match=r"max_batches sees"):
            fit([added], training=shuffled(TRAINING), earlier=first)
        with pytest.raises(DataMismatchError, match="other labels"):
            fit([added], training=relabelled(TRAINING, 3), earlier=first)
    elsewhere = replace(first, training=replace(first.training, limits=torch.tensor([4, 1])))
    fit([whole], training=shuffled(TRAINING), earlier=elsewhere)


def test_batches_that_stand_for_more(in_memory):
    added = LaplaceEvidence(prior_mean="zero", name="other", curvature=OTHER)
    fit([added], training=Batches(batches(TRAINING), size=800), earlier=in_memory)


def test_a_file_without_a_record_is_accepted_with_a_line(in_memory, tmp_path, caplog):
    """Of an earlier version; its held-out data are compared, since it has their logits."""
    save_fit(tmp_path, replace(in_memory, training=None))
    old = load_fit(tmp_path)[0]
    assert old.training is None
    with caplog.at_level(logging.WARNING, "bmoe_lightning"):
        completed = fit([LaplaceEvidence(prior_mean="zero")], earlier=old)
    assert [r.getMessage() for r in caplog.records if "without a record of them" in r.getMessage()]
    assert completed.training is None
    with pytest.raises(DataMismatchError):
        fit([TemperatureScaling()], held_out=relabelled(HELD_OUT, 1), earlier=old)


def on_ranks(rank, world_size, folder):
    """What one process has fitted is completed by two, each with its shard, and refused on both."""
    earlier = load_fit(folder)[0]

    def shards(data, size=8):
        return batches(taken(data, slice(rank, None, world_size)), size)

    added = [LaplaceEvidence(name="other", curvature=OTHER, prior_mean="zero"), TemperatureScaling()]
    for training, held_out, said in (
        (TRAINING, HELD_OUT, None),
        (shuffled(TRAINING), shuffled(HELD_OUT), None),
        (relabelled(TRAINING, 3), HELD_OUT, "training data are not .* other labels"),
        (TRAINING, relabelled(HELD_OUT, 100), "held-out data are not .* other labels"),
    ):
        if said is None:
            found = fit(added, shards(training), shards(held_out), earlier, distributed=True)
            assert found.methods.keys() == {"laplace_lpo", "other", "temperature"}
            continue
        with pytest.raises(DataMismatchError, match=said):
            fit(added, shards(training), shards(held_out), earlier, distributed=True)


def test_several_processes(in_memory, tmp_path):
    save_fit(tmp_path / "fit", in_memory)
    run(lambda *at: on_ranks(*at, tmp_path / "fit"), 2, tmp_path)
