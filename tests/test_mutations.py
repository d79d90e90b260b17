"""Every file of a fit is refused, or read as it was written, whatever was changed in it."""

from __future__ import annotations

import pytest
from mutations import run


@pytest.mark.parametrize("count", [60, pytest.param(500, marks=pytest.mark.slow)])
def test_nothing_is_accepted_silently(count, tmp_path, capsys):
    outcomes, faults = run(count, tmp_path, seed=count)
    with capsys.disabled():
        print(f" {count} mutated: {outcomes['refused']} refused, {outcomes['no effect']} without effect")
    assert faults == []
    assert outcomes["refused"] > 0.8 * count
    assert outcomes["no effect"]
