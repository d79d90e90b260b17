"""The files of a model that predictions depend on."""

from __future__ import annotations

import hashlib
import json
import types

import pytest

from bmoe_lightning.models.loading import ModelUnavailableError
from bmoe_lightning.models.model_files import CONFIG_FILES, TOKENIZER_FILES, file_digests, file_of, tokenizer_files


def test_digests_are_those_of_the_files_that_are_there(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "vocab.json").mkdir()
    (tmp_path / "README.md").write_text("")
    expected = {"config.json": hashlib.sha256(b"{}").hexdigest()}
    assert file_digests(str(tmp_path), TOKENIZER_FILES) == file_digests(str(tmp_path), CONFIG_FILES) == expected
    assert file_of(str(tmp_path), "tokenizer.json") is None


def test_a_tokenizer_may_have_files_of_its_class():
    own = types.SimpleNamespace(vocab_files_names={"vocab_file": "entities.json", "tokenizer_file": "tokenizer.json"})
    assert tokenizer_files(own) == (*TOKENIZER_FILES, "entities.json")


@pytest.mark.parametrize("named", [["tokenizer.4.0.0.json", "tokenizer.9.0.0.json", 3], "tokenizer.4.0.0.json", None])
def test_files_that_the_tokenizer_s_configuration_names_have_digests(tmp_path, named):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"fast_tokenizer_files": named}))
    (tmp_path / "tokenizer.4.0.0.json").write_text("{}")
    more = {"tokenizer.4.0.0.json"} if isinstance(named, list) else set()
    assert set(file_digests(str(tmp_path), TOKENIZER_FILES)) == {"tokenizer_config.json"} | more
    assert file_digests(str(tmp_path), CONFIG_FILES) == {}


@pytest.mark.parametrize("text", ["[]", "{", "\u00ff"])
def test_a_damaged_configuration_names_no_files(tmp_path, text):
    (tmp_path / "tokenizer_config.json").write_text(text, encoding="latin-1")
    assert set(file_digests(str(tmp_path), TOKENIZER_FILES)) == {"tokenizer_config.json"}


@pytest.mark.parametrize("source", ["/no/such/folder", "no such model"])
def test_what_is_no_model_is_refused(source):
    with pytest.raises(ModelUnavailableError, match="there is no folder"):
        file_of(source, "config.json")


def test_a_model_that_is_not_in_the_cache_has_no_files_without_the_hub():
    assert file_digests("owner/no-such-model", CONFIG_FILES) == {}
