"""The fit of a table: what it is of, what it stores, and ranks of which one fails; see also test_workbench.py."""

from __future__ import annotations

import pytest
import torch
from forked_processes import run
from methods_cases import RANK3
from oracles.models import answer_logits, split, toy_batch, toy_model
from workbench_cases import Untouchable

from bmoe_lightning.curvature import Curvature, LinearLayers
from bmoe_lightning.experts import find_expert_layers, weight_fingerprint
from bmoe_lightning.methods import (
    MAP,
    CheckpointEnsemble,
    EvidenceTemperature,
    FitResult,
    Isotropic,
    LaplaceEvidence,
    LaplaceLPO,
    TemperatureScaling,
    evaluate,
    fit_methods,
    save_snapshot,
)
from bmoe_lightning.methods.fitting import fingerprinted_layers, prior_mean_layers
from bmoe_lightning.methods.storage import load_fit, save_fit
from bmoe_lightning.utils.distributed import OtherRankError, gather_number

DOWN = "layers.0.mixture.crew.down_proj"
HELD_OUT = split(toy_batch(num_rows=30, seed=4), 6, 6, 6, 6, 6)
TRAINING = split(toy_batch(num_rows=20, seed=3), 10, 10)
HEAD = Curvature(rank=3, layers=LinearLayers(names=("head",)))


def evidence(name="laplace_evidence", curvature=RANK3, prior_mean="pretrained"):
    return LaplaceEvidence(name=name, curvature=curvature, prior_mean=prior_mean)


def test_is_of_all_expert_layers_without_a_curvature(model):
    fit = fit_methods([TemperatureScaling()], model, answer_logits, [], HELD_OUT)
    layers = find_expert_layers(model)
    assert fit.layers == tuple(layers)
    assert fit.fingerprint == weight_fingerprint(model, layers)
    assert fit.has_weights_of(model)
    assert not fit.has_weights_of(toy_model(3))


def test_is_of_the_layers_of_the_first_curvature(model):
    methods = [MAP(), evidence("head", HEAD), evidence()]
    assert [layer.name for layer in fingerprinted_layers(methods, model)] == ["head"]
    assert fingerprinted_layers(methods[::-1], model) == find_expert_layers(model)


def test_prior_means_of_the_layers_that_methods_ask_for(model):
    lpo = LaplaceLPO(curvature=HEAD, prior_mean="zero")
    assert prior_mean_layers([MAP(), TemperatureScaling(), lpo, evidence(prior_mean="zero")], model) == []
    twice = [evidence(), evidence("again", Curvature(rank=2)), evidence("head", HEAD)]
    names = [layer.name for layer in prior_mean_layers([*twice, EvidenceTemperature(curvature=HEAD)], model)]
    assert names == [*(layer.name for layer in find_expert_layers(model)), "head"]


def test_identifiers(model):
    given = fit_methods([MAP()], model, answer_logits, [], fit_id="ab" * 16)
    assert given.fit_id == "ab" * 16
    drawn = [fit_methods([MAP()], model, answer_logits, []).fit_id for _ in range(2)]
    assert len(set(drawn)) == 2
    completed = fit_methods([TemperatureScaling()], model, answer_logits, [], HELD_OUT, earlier=given, fit_id="cd" * 16)
    assert completed.fit_id == given.fit_id


def test_a_fit_of_loaded_snapshots_predicts_and_is_stored(model, batches, tmp_path):
    """Snapshots carry the id of their fit, which a fit of them has to have."""
    method = CheckpointEnsemble()
    first = FitResult()
    path = tmp_path / "fit" / "snapshots" / "one.safetensors"
    save_snapshot(path, {DOWN: model.get_parameter(DOWN) * 2}, fit=first.fit_id)
    save_fit(tmp_path / "fit", first, [path])
    snapshots = load_fit(tmp_path / "fit")[1]
    fit = fit_methods([MAP(), method], model, answer_logits, [], snapshots=snapshots)
    assert fit.fit_id == first.fit_id
    expected = evaluate([method], fit, model, answer_logits, batches, snapshots)
    save_fit(tmp_path / "fit", fit, snapshots)
    found = evaluate([method], *load_fit(tmp_path / "fit")[:1], model, answer_logits, batches, snapshots)
    assert torch.equal(found[method.name].log_probs, expected[method.name].log_probs)
    assert fit_methods([MAP()], model, answer_logits, [], snapshots=snapshots).fit_id != first.fit_id  # uses none


def test_snapshots_of_another_fit_are_refused_before_the_passes(model, tmp_path):
    ids = "ab" * 16, "cd" * 16
    paths = [tmp_path / name for name in ids]
    for path, fit_id in zip(paths, ids, strict=True):
        save_snapshot(path, {DOWN: model.get_parameter(DOWN) * 2}, fit=fit_id)
    methods = [TemperatureScaling(), CheckpointEnsemble()]
    match = r"belongs to another fit \(cdcdcdcd\) than this one \(abababab\).* without fit_id="
    for options in ({"snapshots": paths}, {"snapshots": paths[1:], "fit_id": ids[0]}):
        with pytest.raises(ValueError, match=match):
            fit_methods(methods, model, answer_logits, [], Untouchable(), **options)
    fit_methods([MAP()], model, answer_logits, [], snapshots=paths)  # uses none


def test_another_seed_is_refused(model):
    """All methods of a fit share their noise."""
    fit = fit_methods([MAP()], model, answer_logits, [], seed=3)
    with pytest.raises(ValueError, match=r"has seed 3.*seed=0 differs"):
        fit_methods([TemperatureScaling()], model, answer_logits, [], HELD_OUT, earlier=fit)


def test_names_are_distinct(model):
    with pytest.raises(ValueError, match="map occurs more than once"):
        fit_methods([MAP(), MAP()], model, answer_logits, [])


def test_a_posterior_that_equals_its_prior_is_not_stored(model):
    """It needs no pass, and is created from the model where it is used."""
    method = Isotropic().with_defaults(RANK3)
    fit = fit_methods([method], model, answer_logits, [], HELD_OUT)
    assert fit.posteriors == {}
    assert fit.training is None
    assert fit.is_fitted(method)


def test_states_are_on_the_cpu_and_no_views(model):
    fit = fit_methods([evidence(prior_mean="zero")], model, answer_logits, TRAINING)
    value = fit.methods["laplace_evidence"].state["prior_precision"]
    assert value.device.type == "cpu"
    assert value.is_contiguous()
    assert value.untyped_storage().nbytes() == value.nbytes
    assert fit.methods["laplace_evidence"].curvatures == (RANK3.digest,)


def failing_in_the_calibration_pass(rank, world_size):
    """With and without covariances, in the loader, and where the other rank has no batch left."""
    model, calls, at = toy_model(), [], 0

    def class_logits(model, batch):
        calls.append(batch)
        if rank == 1 and len(calls) == at:
            raise KeyError("no labels")
        return answer_logits(model, batch)

    def broken():
        yield HELD_OUT[0]
        if rank == 1:
            raise KeyError("no labels")

    plain, with_covariances = [TemperatureScaling()], [LaplaceLPO(curvature=RANK3, prior_mean="zero")]
    for methods, number, held_out in (
        (plain, 2, HELD_OUT),
        (with_covariances, 5, HELD_OUT),
        (plain, 3, HELD_OUT if rank else []),
        (plain, 0, broken()),
    ):
        calls.clear()
        at = number
        with pytest.raises(KeyError if rank == 1 else OtherRankError, match="no labels") as found:
            fit_methods(methods, model, class_logits, TRAINING, held_out, distributed=True)
        assert str(found.value).startswith("on rank 1: ") == (rank != 1)
        assert gather_number(rank) == list(range(world_size))
    at = 0
    fit = fit_methods(plain, model, class_logits, TRAINING, HELD_OUT, distributed=True)
    assert len(fit.calibration[1]) == 30 * world_size


def test_a_rank_that_fails_alone(tmp_path):
    run(failing_in_the_calibration_pass, 2, tmp_path)


def test_labels_that_one_rank_lacks_are_refused_on_all(tmp_path):
    def one_without(rank, world_size):
        bare = [{name: value for name, value in batch.items() if name != "labels"} for batch in HELD_OUT]
        with pytest.raises(ValueError, match="labels"):
            fit_methods(
                [TemperatureScaling()], toy_model(), answer_logits, [], bare if rank else HELD_OUT, distributed=True
            )
        assert gather_number(rank) == list(range(world_size))

    run(one_without, 2, tmp_path)
