"""Counts of outcomes, their table and their file."""

from __future__ import annotations

import pytest

from recipes.faults.outcomes import Outcome, faults_of, store, stored, table


@pytest.fixture
def outcomes():
    first, second = Outcome("runs killed"), Outcome("files")
    for _ in range(3):
        first.add("finished")
    second.add("refused")
    second.add("no effect")
    second.add("", "accepted")
    return [first, second]


def test_table(outcomes):
    assert [outcome.tried for outcome in outcomes] == [3, 3]
    assert table(outcomes).splitlines()[:5] == [
        "| kind | tried | finished | refused | no effect | faults |",
        "| --- | --- | --- | --- | --- | --- |",
        "| runs killed | 3 | 3 | 0 | 0 | 0 |",
        "| files | 3 | 0 | 1 | 1 | 1 |",
        "| all | 6 | 3 | 1 | 1 | 1 |",
    ]
    assert "repaired" not in table(outcomes)
    assert faults_of(outcomes) == ["files: accepted"]


def test_a_finished_stage_is_known_by_its_settings(outcomes, tmp_path):
    path = tmp_path / "kills.json"
    assert stored(path, {"count": 3}) is None
    store(path, {"count": 3}, outcomes)
    assert stored(path, {"count": 3}) == outcomes
    assert stored(path, {"count": 4}) is None
    path.write_text("{")
    with pytest.raises(ValueError, match=str(path)):
        stored(path, {"count": 3})
