"""The files of a model that predictions depend on."""

from __future__ import annotations

import hashlib
import json
import types

import pytest
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from bmoe_lightning.models import model_files
from bmoe_lightning.models.loading import ModelUnavailableError
from bmoe_lightning.models.model_files import (
    CONFIG_FILES,
    TOKENIZER_FILES,
    FileChange,
    NotCachedError,
    changed_files,
    file_digests,
    file_of,
    tokenizer_files,
)

BASE = "owner/base"


class Hub:
    """The files of a model on the hub, and those of them that its cache has."""

    def __init__(self, folder, monkeypatch):
        self.folder, self.online, self.files, self.cache = folder, False, set(), set()
        monkeypatch.setattr(model_files, "hf_hub_download", self.download)

    def add(self, *names):
        for name in names:
            (self.folder / name).write_text(json.dumps(name))
        self.files |= set(names)

    def download(self, source, name):
        if self.online and name in self.files:
            self.cache.add(name)
        if name in self.cache:
            return str(self.folder / name)
        raise EntryNotFoundError(name) if self.online else LocalEntryNotFoundError(name)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A model of which the cache has what a tokenizer was read from, but not tekken.json."""
    found = Hub(tmp_path, monkeypatch)
    found.add("config.json", "tokenizer.json", "tokenizer_config.json")
    found.cache = set(found.files)
    found.add("tekken.json")
    return found


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


@pytest.mark.parametrize("online", [False, True])
def test_a_file_that_the_cache_may_lack_is_no_change(hub, online):
    hub.online = online
    known, cached = file_digests(BASE, TOKENIZER_FILES), hub.cache - {"tekken.json"}
    assert ("tekken.json" in known) == online
    for served_online in (not online, online):
        hub.online, hub.cache = served_online, set(cached)
        assert changed_files(BASE, known, TOKENIZER_FILES) == {}


def test_changes_of_a_model_of_the_hub_are_told(hub):
    hub.online = True
    known = file_digests(BASE, TOKENIZER_FILES)
    (hub.folder / "config.json").write_text("{}")
    hub.files.discard("tekken.json")
    hub.cache.discard("tekken.json")
    expected = {"config.json": FileChange.CHANGED, "tekken.json": FileChange.MISSING}
    assert changed_files(BASE, known, TOKENIZER_FILES) == expected


def test_what_every_tokenizer_is_read_with_must_be_in_the_cache(hub):
    known = file_digests(BASE, TOKENIZER_FILES)
    hub.cache.discard("tokenizer.json")
    assert changed_files(BASE, known, TOKENIZER_FILES) == {"tokenizer.json": FileChange.NOT_CACHED}
    (hub.folder / "tokenizer_config.json").write_text(json.dumps({"fast_tokenizer_files": ["tokenizer.4.0.0.json"]}))
    assert changed_files(BASE, known, TOKENIZER_FILES) == {"tokenizer_config.json": FileChange.CHANGED}
    with pytest.raises(
        NotCachedError, match=r"tokenizer.json of the model 'owner/base' is not in the cache of the hub"
    ):
        file_of(BASE, "tokenizer.json")


def test_files_of_a_folder_are_all_compared(tmp_path):
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_text("{}")
    known = file_digests(str(tmp_path), TOKENIZER_FILES)
    assert changed_files(str(tmp_path), known, TOKENIZER_FILES) == {}
    (tmp_path / "config.json").write_text("[]")
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tekken.json").write_text("{}")
    assert changed_files(str(tmp_path), known, TOKENIZER_FILES) == {
        "config.json": FileChange.CHANGED,
        "tokenizer.json": FileChange.MISSING,
        "tekken.json": FileChange.ADDED,
    }
