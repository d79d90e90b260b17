"""Fixtures of a small training and of the folder that it is saved in; one training for all tests that ask for it."""

from __future__ import annotations

import shutil

import pytest
from serving_cases import fitted, served_of

_MADE = {}


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory):
    if "run" not in _MADE:  # each conftest.py that imports this has a fixture of its own
        _MADE["run"] = fitted(tmp_path_factory.mktemp("served"))
    return _MADE["run"]


@pytest.fixture(scope="session")
def saved(trained_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "model"
    served_of(trained_run).save_pretrained(folder)
    return folder


@pytest.fixture
def copied(saved, tmp_path):
    """A copy of the saved folder, to change."""
    return shutil.copytree(saved, tmp_path / "copied")
