"""The fits to the further fine-tuning runs of an ensemble: each run is trained once, and its fit is made once."""

from __future__ import annotations

import json
import shutil

import pytest
from recipe_runs import run

from bmoe_lightning.curvature import pass_sums
from bmoe_lightning.methods.storage import load_fit, save_fit
from recipes.qwen_obqa.seed_training import SeedTraining

METHODS = "map,laplace_lpo,laplace_mixture,deep_ensemble"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("members") / "run"
    assert run(folder, "--methods", METHODS) == 0
    return folder


def stages(monkeypatch, action):
    """What was trained and fitted meanwhile."""
    said = []
    with monkeypatch.context() as patch:
        patch.setattr(SeedTraining, "say", lambda _, what: said.append(what))
        action()
    return [what for what in said if what.startswith("fi")]


def files(folder):
    return {path: path.read_bytes() for path in sorted(folder.glob("seed-0/*.safetensors"))}


def predicted(folder):
    lines = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    return {name: [line["log_probs"] for line in lines if line["method"] == name] for name in METHODS.split(",")}


def test_the_ensemble_s_members_have_fits(finished):
    fit = load_fit(finished / "seed-0" / "member-1-bayesian_moe")[0]
    own = load_fit(finished / "seed-0" / "bayesian_moe")[0]
    (posterior,) = (entry for entry in fit.methods.values())
    assert posterior.options["class"].endswith("LaplaceLPO")
    assert fit.fingerprint != own.fingerprint
    assert set(fit.posteriors) == set(own.posteriors)
    found = predicted(finished)
    assert found["laplace_mixture"] not in (found["deep_ensemble"], found["laplace_lpo"])


def test_a_run_is_trained_once_and_the_same_with_and_without_a_fit(finished, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    assert stages(monkeypatch, lambda: run(folder, "--methods", "map,deep_ensemble")) == [
        "fine-tuning member 2 of 2 of an ensemble (member 1 is the run itself)",
        "fine-tuning the experts, then curvature and calibration",
    ]
    alone = files(folder)
    assert stages(monkeypatch, lambda: run(folder, "--methods", METHODS)) == [
        "fitting laplace_mixture to member 2 of 2 of an ensemble (member 1 is the run itself)",
        "fitting laplace_lpo, laplace_mixture to the fine-tuned weights",
    ]
    assert [path.name for path in alone] == ["member-1.safetensors", "trained.safetensors"]
    assert files(folder) == alone
    assert list(files(finished).values()) == list(alone.values())
    assert predicted(folder) == predicted(finished)


@pytest.mark.slow
def test_a_killed_pass_of_a_member_is_resumed(finished, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    flags = ("--methods", "laplace_mixture", "--curvature-checkpoint-every", "1")
    added, add = [], pass_sums._add_batch

    def killed(*arguments, **options):
        if len(added) == 1:
            raise RuntimeError("killed")
        add(*arguments, **options)
        added.append(0)

    with monkeypatch.context() as patch:
        patch.setattr(pass_sums, "_add_batch", killed)
        with pytest.raises(RuntimeError, match="killed"):
            run(folder, *flags)
    member = folder / "seed-0" / "member-1-bayesian_moe"
    assert list(member.glob("curvature_state-*"))
    assert not (folder / "seed-0" / "trained.safetensors").exists()
    total = []

    def counted(*arguments, **options):
        add(*arguments, **options)
        total.append(0)

    monkeypatch.setattr(pass_sums, "_add_batch", counted)
    assert run(folder, *flags) == 0
    assert len(total) == 2 * 2 - 1  # two batches each of the member and of this run
    assert not list(member.glob("curvature_state-*"))
    assert predicted(folder)["laplace_mixture"] == predicted(finished)["laplace_mixture"]


@pytest.mark.parametrize("damage", [*(pytest.param(d, marks=pytest.mark.slow) for d in ("gone", "broken")), "foreign"])
def test_a_member_s_fit_that_is_missing_or_foreign_is_made_again(finished, tmp_path, monkeypatch, damage):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    member = folder / "seed-0" / "member-1-bayesian_moe"
    if damage == "gone":
        shutil.rmtree(member)
    elif damage == "broken":
        (member / "index.json").write_text("{}")
    else:  # to the weights of this run
        own = load_fit(folder / "seed-0" / "bayesian_moe")[0]
        entry = load_fit(member)[0].methods["laplace_mixture"]
        shutil.rmtree(member)
        save_fit(member, own.with_methods({"laplace_mixture": entry}, {}))
    for path in folder.glob("seed-0/predictions/*laplace_mixture*"):
        path.unlink()
    made = stages(monkeypatch, lambda: run(folder, "--methods", METHODS))
    assert "fitting laplace_mixture to member 2 of 2 of an ensemble (member 1 is the run itself)" in made
    assert not [what for what in made if what.startswith("fine-tuning")]
    assert predicted(folder) == predicted(finished)
