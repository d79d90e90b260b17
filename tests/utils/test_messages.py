"""Parts of error messages."""

from __future__ import annotations

from bmoe_lightning.utils.messages import first_line, first_names, numbered, shown_path


def test_first_names():
    assert first_names([]) == "none"
    assert first_names({"b", "a"}) == "a, b"
    assert first_names("dcba") == "a, b, c and 1 more"
    assert first_names("dcba", count=1) == "a and 3 more"


def test_names_with_numbers():
    assert numbered({0: "a", 2: "c"}) == "0 is a, 2 is c"
    assert numbered(dict(enumerate("abcdefg"))) == "0 is a, 1 is b, 2 is c ... 6 is g"


def test_a_path_is_printable_and_short():
    assert shown_path("a/ü b") == "a/ü b"
    assert shown_path("a\0b\n") == r"'a\x00b\n'"
    assert shown_path("x" * 1000, limit=10) == "xxxxxxx..."


def test_first_line():
    assert first_line(OSError("not there.\nSee the docs.")) == "not there"
    assert first_line(KeyError()) == "KeyError"
