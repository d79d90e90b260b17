"""The names of methods in `--methods` and `--set`, checked before torch is imported."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from bmoe_lightning.methods.registry import check_method_name, method_names
from recipes.common.cli import UsageError, nearest
from recipes.qwen_obqa.settings import ResolvedSettings

ALL = "all"
"""Stands for all registered methods that a run can fit without training routers."""


def check_names(settings: ResolvedSettings) -> None:
    """Check the names of methods, unless a class has to be imported, which may register further names.

    Args:
        settings: Resolved settings.

    Raises:
        UsageError: If there is no such method, or `--set` is malformed or names a method that is not in the run.
    """
    assignments = [assignment(text) for text in settings.set]
    entries = list(listed_methods(settings.methods))
    names = [entry for entry in entries if isinstance(entry, str) and ":" not in entry]
    if len(names) < len(entries):
        return
    for name in names:
        try:
            check_method_name(name)
        except ValueError as error:
            raise UsageError(f"--methods: {error}") from None
    for path, method, *_ in assignments:
        check_among(path, method, names)


def listed_methods(methods: Sequence[str | dict[str, Any]]) -> Iterator[str | dict[str, Any]]:
    """The entries of `--methods`, with all registered names in place of `all`."""
    for entry in methods:
        if entry == ALL:
            yield from method_names()
        else:
            yield entry


def assignment(text: str) -> tuple[str, str, list[str], str]:
    """The parts of `METHOD.OPTION=VALUE`: the path before the `=`, the method, the options within, and the value.

    Raises:
        UsageError: If it is malformed.
    """
    path, equals, value = text.partition("=")
    method, *names = path.split(".")
    if not equals or not names or not all((method, *names)):
        raise UsageError(f"--set must be METHOD.OPTION=VALUE, got {text!r}")
    return path, method, names, value


def check_among(path: str, method: str, methods: Sequence[str]) -> None:
    """Check that the method of `--set` is in the run.

    Raises:
        UsageError: If it is not.
    """
    if method not in methods:
        raise UsageError(
            f"--set {path}: {method!r} is not among --methods{nearest(method, methods)}; there are {', '.join(methods)}"
        )
