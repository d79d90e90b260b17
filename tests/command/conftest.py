"""A small training, the folder that it is saved in and a file of questions, for all tests of the command."""

from __future__ import annotations

import pytest
from predict_cases import EVERY
from serving_cases import rows_of, write_rows
from serving_fixtures import copied, saved, trained_run

__all__ = ["copied", "saved", "trained_run"]


@pytest.fixture
def data(tmp_path):
    return write_rows(tmp_path / "questions.jsonl", rows_of(EVERY))
