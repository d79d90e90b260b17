"""The file by which a folder is served."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest

from bmoe_lightning.methods import get_method
from bmoe_lightning.serving import MANIFEST_FILE, CalibratedModel, Manifest, QuestionFormat, method_entry
from bmoe_lightning.serving.manifest import LoRAShape, place
from bmoe_lightning.utils.file_header import DamagedFileError, seal
from recipes.faults.mutations import edited_json

MANIFEST = Manifest(
    model="owner/model",
    tokenizer="../tokenizer",
    fit="fit",
    questions=QuestionFormat("letters", 4, (3, 4, 5, 6), padding_side="right"),
    methods=(method_entry(get_method("map")),),
    weights="trained.safetensors",
    precision="bf16-true",
    lora=LoRAShape(8, 16.0, ("q_proj", "v_proj")),
    data=("Sätze.",),
    results=({"method": "MAP", "acc": 0.5},),
    sha256={"a/b": "0" * 64},
    model_sha256={"config.json": "1" * 64},
    tokenizer_sha256={"tokenizer.json": "2" * 64},
)


def test_is_read_as_it_was_written(tmp_path):
    MANIFEST.write(tmp_path)
    assert Manifest.read(tmp_path) == MANIFEST
    cloze = replace(MANIFEST, lora=None, weights=None, questions=QuestionFormat("cloze", 4, None, shared_prompts=True))
    cloze.write(tmp_path)
    assert Manifest.read(tmp_path) == cloze


@pytest.mark.parametrize(
    "change",
    [
        {"model": ""}, {"model": 3}, {"tokenizer": None}, {"fit": ["fit"]}, {"fit": "a\0b"}, {"weights": 3},
        {"weights": ""}, {"precision": "8-true"}, {"precision": ["32-true"]}, {"methods": []}, {"methods": "map"},
        {"methods": ["map"]}, {"methods": {"map": {}}}, {"methods": [3]}, {"data": "text"}, {"data": [3]},
        {"results": [3]}, {"results": {"a": 1}}, {"sha256": ["a"]}, {"sha256": {"a": 3}}, {"sha256": {"": "0"}},
        {"sha256": None}, {"model_sha256": ["a"]}, {"model_sha256": None}, {"tokenizer_sha256": {"tokenizer.json": 3}},
        {"tokenizer_sha256": {"": "0"}}, {"lora": {}}, {"lora": []},
        {"lora": {"rank": 8, "alpha": 16.0, "target_modules": "q_proj"}},
        {"lora": {"rank": "8", "alpha": 16.0, "target_modules": ["q"]}},
        {"lora": {"rank": 8, "alpha": "16", "target_modules": ["q"]}},
        {"lora": {"rank": 8, "alpha": 16.0, "target_modules": [3]}},
        {"questions": None}, {"questions": []}, {"questions": {}}, {"other": 1},
    ],
)  # fmt: skip
def test_other_values_are_refused_with_the_path(tmp_path, change):
    MANIFEST.write(tmp_path)
    path = tmp_path / MANIFEST_FILE
    fields = json.loads(path.read_text())
    path.write_text(seal({**fields, "description": {**fields["description"], **change}})[0])
    with pytest.raises(DamagedFileError, match=str(path)):
        Manifest.read(tmp_path)


@pytest.mark.parametrize("name", ["sha256", "model_sha256", "tokenizer_sha256", "lora", "data", "results"])
def test_an_entry_that_an_earlier_release_lacked_has_its_default(tmp_path, name):
    MANIFEST.write(tmp_path)
    path = tmp_path / MANIFEST_FILE
    fields = json.loads(path.read_text())
    del fields["description"][name]
    path.write_text(seal(fields)[0])
    assert not getattr(Manifest.read(tmp_path), name)


@pytest.mark.parametrize("name", ["model", "tokenizer", "fit", "questions"])
def test_a_missing_entry_is_refused(tmp_path, name):
    MANIFEST.write(tmp_path)
    path = tmp_path / MANIFEST_FILE
    fields = json.loads(path.read_text())
    del fields["description"][name]
    path.write_text(seal(fields)[0])
    with pytest.raises(DamagedFileError, match=f"incomplete.*{name}"):
        Manifest.read(tmp_path)


def test_other_files_are_refused(tmp_path):
    path = tmp_path / MANIFEST_FILE
    with pytest.raises(FileNotFoundError, match=str(path)):
        Manifest.read(tmp_path)
    for text in ("", "{", "[]", "null", '{"format": 3}', "{}"):
        path.write_text(text)
        with pytest.raises(DamagedFileError, match=str(path)):
            Manifest.read(tmp_path)
    MANIFEST.write(tmp_path)
    fields = json.loads(path.read_text())
    path.write_text(seal({**fields, "version": 2})[0])
    with pytest.raises(ValueError, match=r"version 2.*Update bmoe_lightning"):
        Manifest.read(tmp_path)
    path.write_text(seal({**fields, "format": "snapshot"})[0])
    with pytest.raises(ValueError, match="is a snapshot file"):
        Manifest.read(tmp_path)


def test_whatever_is_changed_is_served_or_refused_in_a_sentence(copied):
    """An edit under a digest that was computed again: one that is accepted has no effect on the model's methods."""
    path, rng, refused = copied / MANIFEST_FILE, random.Random(0), 0
    fields = json.loads(path.read_text())
    for _ in range(120):
        name, edited = edited_json({"description": fields["description"]}, rng, free=())
        path.write_text(seal({**fields, **edited})[0])
        try:
            CalibratedModel.from_pretrained(copied)
        except (ValueError, OSError, RuntimeError) as error:
            refused += bool(str(error))
        except Exception as error:
            raise AssertionError(f"{name}: {error!r}") from error
    assert refused > 60


def test_paths_are_those_of_the_folder_and_hub_ids_stay(tmp_path):
    (tmp_path / "model").mkdir()
    assert place(tmp_path, "model") == str(tmp_path / "model")
    assert place(tmp_path, ".") == str(tmp_path)
    assert place(tmp_path, "owner/model") == "owner/model"
    assert place(tmp_path, "../gone") == str(tmp_path / ".." / "gone")
    assert place(tmp_path, "/gone") == "/gone"
