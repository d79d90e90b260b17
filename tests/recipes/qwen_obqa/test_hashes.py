"""What `results.json` says that the numbers were made from."""

from __future__ import annotations

import json

import pytest
from recipe_runs import run

import bmoe_lightning

METHODS = ("--methods", "map,temperature,laplace_evidence")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same command twice, and once with another seed."""
    folder = tmp_path_factory.mktemp("hashes")
    found = {}
    for name, seed in (("one", 0), ("again", 0), ("other", 1)):
        assert run(folder / name, *METHODS, "--first-seed", str(seed), "--limit", "16") == 0
        found[name] = json.loads((folder / name / "results.json").read_text())
    return folder, found


def test_the_same_command_has_the_same_hashes(runs):
    _, found = runs
    assert found["one"]["hashes"] == found["again"]["hashes"]
    assert found["one"]["rows"] == found["again"]["rows"]


def test_every_kind_is_named_and_another_seed_has_others(runs):
    _, found = runs
    one, other = found["one"]["hashes"], found["other"]["hashes"]
    assert one["data"] == other["data"]
    assert list(one["data"]) == ["train", "calibration", "test"]
    assert len(set(one["data"].values())) == 3
    (one,), (other,) = one["seeds"].values(), other["seeds"].values()
    assert one["pretrained_weights"] == other["pretrained_weights"]  # random ones of a dry run
    assert one["trained_weights"] != other["trained_weights"]
    assert one["posteriors"].keys() == other["posteriors"].keys()
    assert not set(one["posteriors"].values()) & set(other["posteriors"].values())
    assert one["methods"].keys() == {"temperature", "laplace_evidence"}
    assert one["methods"]["laplace_evidence"] != other["methods"]["laplace_evidence"]


def test_versions_are_named(runs):
    versions = runs[1]["one"]["versions"]
    assert versions.keys() == {"python", "torch", "lightning", "transformers", "torchmetrics", "bmoe_lightning"}
    assert versions["bmoe_lightning"] == bmoe_lightning.__version__


def test_weights_that_were_removed_have_none(runs):
    folder, found = runs
    (folder / "one" / "seed-0" / "trained.safetensors").unlink()
    assert run(folder / "one", *METHODS, "--first-seed", "0", "--limit", "16") == 0
    hashes = json.loads((folder / "one" / "results.json").read_text())["hashes"]
    assert hashes["seeds"]["0"] == {**found["one"]["hashes"]["seeds"]["0"], "trained_weights": ""}
