"""Parts of error messages."""

from __future__ import annotations

from bmoe_lightning.utils.messages import first_line, first_names


def test_first_names():
    assert first_names([]) == "none"
    assert first_names({"b", "a"}) == "a, b"
    assert first_names("dcba") == "a, b, c and 1 more"
    assert first_names("dcba", count=1) == "a and 3 more"


def test_first_line():
    assert first_line(OSError("not there.\nSee the docs.")) == "not there"
    assert first_line(KeyError()) == "KeyError"
