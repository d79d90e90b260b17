"""Folders of served models whose files were changed, or whose manifest names what it should not."""

from __future__ import annotations

import pickle
import shutil
import types
from pathlib import Path

import pytest
import torch
from finetuner_cases import TEST, qwen
from serving_cases import NAMES, bits, edit_manifest

from bmoe_lightning.laplace.posterior import WeightMismatchError
from bmoe_lightning.serving import MANIFEST_FILE, CalibratedModel, UnknownMethodError
from bmoe_lightning.serving.loading import load_served
from bmoe_lightning.utils.file_header import DamagedFileError

KINDS = (
    "model.safetensors",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "bayesian_moe/index.json",
    "bayesian_moe/methods-*.safetensors",
    "bayesian_moe/posterior.safetensors",
    "bayesian_moe/snapshots/*.safetensors",
    "members/deep_ensemble/1.safetensors",
    "members/laplace_mixture/1.safetensors",
    "members/laplace_mixture/1/index.json",
    "members/laplace_mixture/1/posterior.safetensors",
)


def flipped(content):
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def test_every_file_is_of_a_kind_below(saved):
    found = {path for path in saved.rglob("*") if path.is_file()}
    kinds = {path for kind in KINDS for path in saved.glob(kind)}
    rest = {path.relative_to(saved).as_posix() for path in found - kinds}
    assert {name for name in rest if "methods-" not in name} == {"README.md", MANIFEST_FILE}


@pytest.mark.parametrize("kind", KINDS)
def test_a_changed_or_missing_file_is_named(copied, kind):
    path = next(copied.glob(kind))
    content = path.read_bytes()
    for changed in (flipped(content), content[:-1], content[: len(content) // 2], b"", content + b" "):
        path.write_bytes(changed)
        with pytest.raises(DamagedFileError, match=f"{path} is damaged or was changed"):
            CalibratedModel.from_pretrained(copied)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=f"{path} is missing"):
        CalibratedModel.from_pretrained(copied)


def test_a_model_card_may_be_completed_by_hand(copied):
    with (copied / "README.md").open("a") as file:
        file.write("\nMore words.\n")
    (copied / ".gitattributes").write_text("*.safetensors filter=lfs\n")
    assert CalibratedModel.from_pretrained(copied).methods


@pytest.mark.parametrize("change", [flipped, lambda content: content[:-20], lambda content: b"", lambda _: b"\xff\x00"])
def test_a_damaged_manifest_is_refused(copied, change):
    path = copied / MANIFEST_FILE
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(DamagedFileError, match=str(path)):
        CalibratedModel.from_pretrained(copied)


def test_an_edited_manifest_under_its_old_digest_is_refused(copied):
    edit_manifest(copied, lambda content: content.update(precision="64-true"), sealed=False)
    with pytest.raises(DamagedFileError, match="does not match its SHA-256 digest"):
        CalibratedModel.from_pretrained(copied)


@pytest.mark.parametrize("path", ["../other/bayesian_moe", "/etc", "bayesian_moe/../../other/bayesian_moe"])
@pytest.mark.parametrize("name", ["model", "tokenizer", "fit", "weights", "sha256", "runs", "fits"])
def test_a_saved_folder_names_nothing_outside_of_it(copied, name, path):
    shutil.copytree(copied, copied.parent / "other")

    def change(content):
        if name == "sha256":
            content["sha256"][path] = "0" * 64
        elif name in ("runs", "fits"):
            entry = next(entry for entry in content["methods"] if "fits" in entry)
            entry[name] = [path]
        else:
            content[name] = path

    edit_manifest(copied, change)
    with pytest.raises(DamagedFileError, match=f"{MANIFEST_FILE} names '{path}', which is not in its folder"):
        CalibratedModel.from_pretrained(copied)


def test_the_model_of_a_saved_folder_is_no_hub_id(copied):
    edit_manifest(copied, lambda content: content.update(model="owner/model"))
    with pytest.raises(Exception, match=str(copied / "owner" / "model")):
        CalibratedModel.from_pretrained(copied)


def unsealed(folder, **changes):
    """The folder as that of a run, whose manifest has no digests."""
    edit_manifest(folder, lambda content: content.update(sha256={}, **changes))
    return folder


def test_the_folder_of_a_run_may_name_what_is_beside_it(copied):
    shutil.move(copied / "bayesian_moe", copied.parent / "fit")
    served = CalibratedModel.from_pretrained(unsealed(copied, fit="../fit"), methods=["laplace_lpo"])
    assert served.predict(TEST).log_probs.shape == (len(TEST), 4)


def test_files_of_a_run_are_never_those_of_the_current_folder(copied, monkeypatch):
    unsealed(copied)
    (copied.parent / "here").mkdir()
    shutil.move(copied / "members", copied.parent / "here" / "members")
    monkeypatch.chdir(copied.parent / "here")
    path = copied / "members" / "deep_ensemble" / "1.safetensors"
    with pytest.raises(FileNotFoundError, match=f"{path} is missing, which deep_ensemble predicts with"):
        CalibratedModel.from_pretrained(copied)
    assert CalibratedModel.from_pretrained(copied, methods=["map"]).methods  # as the message says
    unsealed(copied, model="../gone")
    with pytest.raises(Exception, match=str(copied / ".." / "gone")):
        CalibratedModel.from_pretrained(copied, methods=["map"])


@pytest.mark.parametrize("kind", ["bayesian_moe/*.safetensors", "bayesian_moe/index.json", "bayesian_moe/snapshots/*"])
def test_files_of_a_run_have_their_own_digests(copied, kind):
    unsealed(copied)
    path = max(copied.glob(kind))
    content = path.read_bytes()
    for changed in (flipped(content), content[:-5], b""):
        path.write_bytes(changed)
        with pytest.raises((ValueError, OSError), match=str(path)):
            CalibratedModel.from_pretrained(copied).predict(TEST, "swag")


def test_other_weights_are_refused(copied):
    unsealed(copied)
    qwen(seed=3).save_pretrained(copied)
    with pytest.raises(WeightMismatchError, match="other weights"):
        CalibratedModel.from_pretrained(copied)


def test_a_foreign_method_is_refused_unless_it_is_given_or_not_wanted(copied):
    def change(content):
        content["methods"][NAMES.index("laplace_lpo")]["class"] = "os:system"

    lpo = next(method for method in CalibratedModel.from_pretrained(copied).methods if method.name == "laplace_lpo")
    expected = bits(CalibratedModel.from_pretrained(copied), "laplace_lpo")
    edit_manifest(copied, change)
    with pytest.raises(UnknownMethodError, match=r"'os:system' of the method 'laplace_lpo'.*the method in methods="):
        CalibratedModel.from_pretrained(copied)
    assert torch.equal(bits(CalibratedModel.from_pretrained(copied, methods=[lpo]), "laplace_lpo"), expected)
    assert CalibratedModel.from_pretrained(copied, methods=["map", "swag"]).method().name == "swag"


def test_a_folder_with_several_runs_asks_for_one(copied):
    for seed in (0, 1):
        shutil.copytree(copied, copied.parent / "run" / f"seed-{seed}")
    folder = copied.parent / "run"
    with pytest.raises(ValueError, match=r"has 2 fine-tuned models; name one of .*seed-0, .*seed-1"):
        CalibratedModel.from_pretrained(folder)
    shutil.rmtree(folder / "seed-1")
    assert load_served(folder).fit == folder / "seed-0" / "bayesian_moe"
    assert load_served(copied.parent) is None
    assert load_served(copied / "README.md") is None


class Trap:
    def __reduce__(self):
        return (Path.touch, (Path("/tmp/unpickled-by-a-served-model"),))


@pytest.mark.parametrize(
    "content",
    [
        {"state_dict": {"model.lm_head.weight": Trap()}},
        {"state_dict": {}, "callbacks": Trap()},
        {"state_dict": {}},
        {"state_dict": {"model.lm_head.weight": "text"}},
        {"state_dict": {"model.lm_head.weight": torch.zeros(1)}},
        {"state_dict": {"other": torch.zeros(1)}},
        {"state_dict": [1]},
        {},
        [1],
    ],
)
def test_a_checkpoint_has_nothing_but_tensors_of_the_model(copied, content):
    torch.save(content, copied / "last.ckpt")
    unsealed(copied, weights="last.ckpt")
    with pytest.raises(ValueError, match=str(copied / "last.ckpt")):
        CalibratedModel.from_pretrained(copied)
    assert not Path("/tmp/unpickled-by-a-served-model").exists()


def test_other_checkpoints_are_named(copied):
    unsealed(copied, weights="last.ckpt")
    with pytest.raises(FileNotFoundError, match=str(copied / "last.ckpt")):
        CalibratedModel.from_pretrained(copied)
    (copied / "last.ckpt").write_bytes(pickle.dumps(types.SimpleNamespace(a=1)))
    with pytest.raises(ValueError, match=str(copied / "last.ckpt")):
        CalibratedModel.from_pretrained(copied)
    (copied / "last.ckpt").unlink()
    (copied / "last.ckpt").mkdir()
    with pytest.raises(ValueError, match="is a sharded checkpoint; consolidate it first"):
        CalibratedModel.from_pretrained(copied)
