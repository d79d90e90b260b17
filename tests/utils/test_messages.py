"""Parts of error messages."""

from __future__ import annotations

from bmoe_lightning.utils.messages import described, first_line, first_names, numbered, shown, shown_path


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


def test_a_shown_value_is_short_and_printable():
    assert shown(["a", 1, None]) == "['a', 1, None]"
    nested = []
    for _ in range(5000):
        nested = [nested]
    for value in ("word " * 600, "\ud800\n" * 600, nested, [["x" * 90] * 26] * 26, {str(n): n for n in range(500)}):
        text = shown(value)
        assert len(text) <= 300
        assert text.isprintable()
        assert "..." in text


def test_a_described_value_has_its_kind_in_words():
    values = {None: "null", True: "the boolean True", 3: "the number 3", 0.5: "the number 0.5", "a": "the text 'a'"}
    assert [described(value) for value in values] == list(values.values())
    assert described(["a"]) == "the list ['a']"
    assert described({"a": 1}) == "the object {'a': 1}"
    assert described(b"a") == "bytes b'a'"
    assert len(described("word " * 600)) < 300
