"""Every file of a fit is refused, or read as it was written, whatever was changed in it; and what is not is noticed."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from serving_cases import as_run, fitted, served_of

from bmoe_lightning.utils.json_io import read_json_file, write_json_file
from bmoe_lightning.utils.safetensors_io import read_tensor_file, write_tensor_file
from recipes.faults.damaged_files import Part, kind_of, mutated
from recipes.faults.mutations import ALL, DAMAGES, edited_json, mutation
from recipes.faults.outcomes import faults_of
from recipes.faults.samples import fit_part, fitted_methods, pass_part, run_part

SAMPLE = {"format": "sample", "version": 1}


def nothing(_):
    pass


def test_nothing_is_accepted_silently(tmp_path, capsys):
    count = 60
    quick = [method for method in fitted_methods() if not method.needs.router_training]
    part = fit_part(tmp_path / "fits", quick)
    outcomes = mutated(part, count, random.Random(0), nothing, tmp_path / "copy")
    refused = sum(outcome.counts["refused"] for outcome in outcomes)
    with capsys.disabled():
        print(f" {count} mutated: {refused} refused")
    assert faults_of(outcomes) == []
    assert sum(outcome.tried for outcome in outcomes) == count
    assert refused > 0.8 * count
    (names,) = part.further()
    assert names.faults == []
    assert names.counts["refused"] > 20


def test_a_killed_pass(tmp_path):
    outcomes = mutated(pass_part(tmp_path / "pass"), 15, random.Random(0), nothing, tmp_path / "copy")
    assert [outcome.kind for outcome in outcomes] == ["killed pass: sums of a curvature pass"]
    assert faults_of(outcomes) == []


def test_the_configuration_and_the_tokenizer_of_a_run_are_verified(tmp_path):
    fitted_run = fitted(tmp_path / "training", ("map", "temperature"))
    folder = tmp_path / "run" / "seed-0"
    served_of(fitted_run).save_pretrained(folder)
    as_run(folder, "../model/small")
    part = run_part("run", folder.parent)
    assert {"config.json", "tokenizer.json", "tokenizer_config.json"} < {path.name for path in part.files(part.folder)}
    part = replace(part, chosen=tuple(name for name in part.chosen if name.startswith("model/")), kinds=DAMAGES)
    (outcome,) = mutated(part, 20, random.Random(0), nothing, tmp_path / "copy")
    assert (outcome.kind, outcome.faults, outcome.counts) == ("run: files of the model", [], {"refused": 20})


@pytest.fixture
def sample(tmp_path):
    """A folder with a file of each kind."""
    folder = tmp_path / "sample"
    tensors = {"a": torch.arange(6.0), "b": torch.ones(2, 3).double()}
    write_tensor_file(folder / "state-0.safetensors", tensors, description={"x": [1, {"y": 2}]}, **SAMPLE)
    write_json_file(folder / "index.json", description={"x": [1, {"y": 2}]}, **SAMPLE)
    return folder


def read_verified(folder):
    return [
        read_tensor_file(folder / "state-0.safetensors", **SAMPLE),
        read_json_file(folder / "index.json", **SAMPLE).description,
    ]


def test_a_reader_that_verifies_digests_has_no_fault_under_damages(sample, tmp_path):
    part = Part("sample", sample, read_verified, kinds=DAMAGES)
    outcomes = mutated(part, 60, random.Random(0), nothing, tmp_path / "copy")
    assert [outcome.kind for outcome in outcomes] == ["sample: index", "sample: states of methods"]
    assert faults_of(outcomes) == []
    assert all(outcome.counts["refused"] > 10 for outcome in outcomes)


@pytest.mark.parametrize(
    ("read", "kinds", "complaint"),
    [
        (lambda folder: load_file(folder / "state-0.safetensors"), ALL[:-1], "accepted, with other"),
        (
            lambda folder: json.loads((folder / "index.json").read_text())["description"]["x"][1]["y"],
            DAMAGES,
            "no sentence: ",
        ),
    ],
)
def test_readers_that_do_not_are_noticed(sample, tmp_path, read, kinds, complaint):
    outcomes = mutated(Part("sample", sample, read, kinds=kinds), 60, random.Random(0), nothing, tmp_path / "copy")
    assert any(complaint in fault for fault in faults_of(outcomes))


def test_a_refusal_without_the_path_is_a_fault(sample, tmp_path):
    def read(folder):
        try:
            return read_verified(folder)
        except ValueError:
            raise ValueError("a file is damaged") from None

    outcomes = mutated(Part("sample", sample, read, kinds=DAMAGES), 20, random.Random(0), nothing, tmp_path / "copy")
    assert any("refused without its path" in fault for fault in faults_of(outcomes))


@pytest.mark.parametrize("kind", sorted(set(ALL)))
def test_every_kind_changes_the_file(sample, tmp_path, kind):
    other = tmp_path / "index.json"
    write_json_file(other, description={"x": 3}, **SAMPLE)
    rng, found = random.Random(0), 0
    for path in sorted(sample.iterdir()):
        for _ in range(10):
            change = mutation(path, rng, (kind,), lambda _: [other])
            if change is not None:
                assert change.content != path.read_bytes()
                found += 1
    assert found >= 8


def test_an_edit_of_json_leaves_the_original_and_the_free_entries():
    value = {"a": [1, {"b": 2}], "seed": 3}
    before, rng = json.dumps(value), random.Random(0)
    edits = [edited_json(value, rng, free=("seed",)) for _ in range(50)]
    assert json.dumps(value) == before
    assert all(edited["seed"] == 3 and json.dumps(edited) != before for _, edited in edits)
    assert len({place for place, _ in edits}) > 5


def test_kinds_of_files(tmp_path):
    names = {
        "index.json": "index",
        "00000000-epoch-0001.safetensors": "snapshot",
        "curvature_state-1.safetensors": "sums of a curvature pass",
        "calibrated_model.json": "manifest",
        "tokenizer.json": "files of the model",
        "predictions/map.safetensors": "predictions",
    }
    assert {name: kind_of(tmp_path / name) for name in names} == names
