"""The attribution of a finished run's predictions, on a model with random weights."""

from __future__ import annotations

import pytest
import torch

from bmoe_lightning.laplace import Attribution
from bmoe_lightning.methods import get_method
from bmoe_lightning.utils.safetensors_io import read_tensor_file, write_tensor_file
from recipes.paper.attribution import ATTRIBUTION_FILE, make_attribution, read_attribution
from recipes.qwen_obqa.seed_run import SeedRun

LPO = get_method("laplace_lpo")


@pytest.fixture
def made(finished_run):
    """The study's folder, the run and the path of the attribution, which other tests find as it was made."""
    output, run = finished_run
    path = output / ATTRIBUTION_FILE
    make_attribution(output, run)
    content = path.read_bytes()
    yield output, run, path
    path.write_bytes(content)


@pytest.fixture
def repeated(monkeypatch):
    """How often a model is loaded."""
    loaded, load = [], SeedRun.with_trained

    def recorded(self, action):
        loaded.append(self.seed)
        load(self, action)

    monkeypatch.setattr(SeedRun, "with_trained", recorded)
    return loaded


def test_the_parts_add_up_to_the_variance_that_is_stored_with_the_predictions(made):
    output, run, _ = made
    found = read_attribution(output)
    assert (found.method, found.seed) == ("laplace_lpo", run.seed)
    ids = tuple(question.id for question in run.source.test)
    stored = run.predictions.read(LPO, run.seed, ids)
    total = Attribution(found.layers).total
    torch.testing.assert_close(total, stored.uncertainty["logit_variance"], rtol=1e-6, atol=0)
    assert [layer.index for layer in found.layers] == [0, 1, 2]
    assert all(bool((layer.slots.sum(1) > 0).all()) for layer in found.layers)


def test_what_is_stored_is_made_again_only_for_other_predictions(made, repeated):
    output, run, path = made
    make_attribution(output, run)
    assert repeated == []
    file = read_tensor_file(path, format="attribution", version=1)
    of_others = {**file.description, "origin": {**file.description["origin"], "fit": "another"}}
    write_tensor_file(path, file.tensors, format="attribution", version=1, description=of_others)
    assert read_attribution(output) is None
    make_attribution(output, run)
    assert repeated == [run.seed]
    again = read_tensor_file(path, format="attribution", version=1)
    assert again.description == file.description
    assert all(torch.equal(again.tensors[name], value) for name, value in file.tensors.items())


@pytest.mark.parametrize("damage", ["bytes", "a layer", "numbers"])
def test_a_damaged_file_is_named_and_made_again(made, repeated, damage):
    output, run, path = made
    file = read_tensor_file(path, format="attribution", version=1)
    if damage == "bytes":
        path.write_bytes(path.read_bytes()[:-20])
    else:
        tensors = {**file.tensors, "0/variance": file.tensors["0/variance"] * torch.nan}
        if damage == "a layer":
            del tensors["0/variance"]
        write_tensor_file(path, tensors, format="attribution", version=1, description=file.description)
    with pytest.raises(ValueError, match=r"attribution\.safetensors is not a complete attribution file"):
        read_attribution(output)
    with pytest.warns(UserWarning, match="The attribution is made again"):
        make_attribution(output, run)
    assert repeated == [run.seed]


def test_nothing_is_made_without_the_weights_the_method_or_one_process(made, repeated, monkeypatch):
    output, run, path = made
    path.unlink()
    weights, aside = run.folder / "trained.safetensors", run.folder / "aside"
    weights.rename(aside)
    try:
        make_attribution(output, run)
    finally:
        aside.rename(weights)
    with monkeypatch.context() as patch:
        patch.setattr(run, "methods", run.methods[:2])
        make_attribution(output, run)
    monkeypatch.setattr("recipes.paper.attribution.num_processes", lambda: 2)
    make_attribution(output, run)
    assert repeated == []
    assert read_attribution(output) is None
