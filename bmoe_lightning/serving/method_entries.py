"""Methods with all their options as JSON values, and back.

Only registered classes are looked up: a file that names code must not run it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from bmoe_lightning.curvature.spec import Curvature, ExpertLayers, LayerSelection, LinearLayers, LoRALayers
from bmoe_lightning.methods.base import Method, check_method_names
from bmoe_lightning.methods.options import plain
from bmoe_lightning.methods.registry import get_method, method_names

RUNS, FITS = "runs", "fits"
"""Options with the files of further runs and the folders of their fits; see `Needs.runs` and `Needs.run_methods`."""

_CLASS, _NAME = "class", "name"
_SELECTION = "selection"
_LAYERS = "layers"


class UnknownMethodError(ValueError):
    """A file describes a method whose class is not registered here, or has other options here."""


def method_entry(method: Method) -> dict[str, Any]:
    """A method as JSON values: its class, its name and all its options.

    Args:
        method: The method.
    """
    options = {entry.name: _plain(getattr(method, entry.name)) for entry in fields(method)}
    return {_CLASS: _class_name(type(method)), **options}


def methods_of_entries(entries: Iterable[Mapping[str, Any]], wanted: Sequence[str | Method] = ()) -> list[Method]:
    """The methods of entries, those that are wanted: a class that is not registered does not matter for others.

    Args:
        entries: As for `method_of_entry`.
        wanted: Names of methods, and methods that need no entry; none for the methods of all entries.

    Raises:
        UnknownMethodError: As `method_of_entry`.
    """
    names = [entry for entry in wanted if isinstance(entry, str)]
    return [method_of_entry(entry) for entry in entries if not wanted or entry.get(_NAME) in names]


def method_of_entry(entry: Mapping[str, Any]) -> Method:
    """The method of an entry; options that the entry lacks have their default.

    Args:
        entry: As of `method_entry`, or fit options with a name.

    Raises:
        UnknownMethodError: If the class is not registered, or has no such option or value.
    """
    given = dict(entry)
    wanted, name = given.pop(_CLASS, None), given.get(_NAME)
    kind = next((kind for kind in _registered() if _class_name(kind) == wanted), None)
    if kind is None:
        raise UnknownMethodError(
            f"the class {wanted!r} of the method {name!r} is not registered here; install the package that has it, or "
            "pass the method in methods="
        )
    try:
        method = kind(**{option: _value(value) for option, value in given.items()})
        check_method_names([method])
    except (AttributeError, TypeError, ValueError) as error:  # whatever values of other types make it raise
        raise UnknownMethodError(
            f"the method {name!r} cannot be made of its description ({error}); use the release that wrote it, or pass "
            "the method in methods="
        ) from error
    return method


def with_paths(method: Method, paths: Mapping[str, Sequence[Path]]) -> Method:
    """The method with the files of further runs at other places; unchanged where it has none.

    Args:
        method: The method.
        paths: Paths by the name of their option, `RUNS` or `FITS`.
    """
    changed: dict[str, Any] = {name: tuple(map(str, found)) for name, found in paths.items() if found}
    return replace(method, **changed) if changed else method


def paths_of(method: Method) -> dict[str, list[Path]]:
    """The files of further runs that a method predicts with, by the name of the option.

    Args:
        method: The method.
    """
    return {name: [Path(path) for path in getattr(method, name, ())] for name in (RUNS, FITS)}


def _registered() -> Iterator[type[Method]]:
    return (type(get_method(name)) for name in method_names())


def _selections() -> Iterator[type[LayerSelection]]:
    """The selections of layers of this package, and those of the registered methods' own curvatures."""
    yield from (ExpertLayers, LinearLayers, LoRALayers)
    for name in method_names():
        yield from (type(curvature.layers) for curvature in get_method(name).with_defaults(Curvature()).curvatures)


def _class_name(kind: type[Method | LayerSelection]) -> str:
    return f"{kind.__module__}:{kind.__qualname__}"


def _plain(value: Any) -> Any:
    if isinstance(value, Curvature):  # its description has what affects the factors only
        return {**plain(value), "offload": value.offload, "cache_bytes": value.cache_bytes}
    return plain(value)


def _value(value: Any) -> Any:
    """An option from its JSON value: curvatures and layers by their own keys, and tuples for lists."""
    if isinstance(value, Mapping):
        if _SELECTION in value:
            return _selection(value)
        restored = {str(key): _value(entry) for key, entry in value.items()}
        return Curvature(**restored) if isinstance(restored.get(_LAYERS), LayerSelection) else restored
    if isinstance(value, list):
        return tuple(map(_value, value))
    return value


def _selection(value: Mapping[str, Any]) -> LayerSelection:
    given = dict(value)
    name = given.pop(_SELECTION)
    kind = next((kind for kind in _selections() if _class_name(kind) == name), None)
    if kind is None:
        raise ValueError(f"unknown selection of layers {name!r}")
    return kind(**{option: _value(entry) for option, entry in given.items()})
