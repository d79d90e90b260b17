"""Command lines and YAML files of all recipes: one dataclass of options each, parsed by jsonargparse.

Torch and transformers are not imported here, so that `--help` is fast.
"""

from __future__ import annotations

import argparse
import difflib
import functools
import re
import sys
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, field, fields, is_dataclass
from typing import Any, Literal, TypeVar

from jsonargparse import ArgumentParser

from bmoe_lightning.utils.late_import import raise_for_torchvision
from recipes.common.refusals import refusal

T = TypeVar("T")

_UNKNOWN = re.compile(r"unrecognized arguments: (\S+)|Option '([^']+)' is not accepted", re.IGNORECASE)
_REFUSED = re.compile(r'Parser key "(?P<name>[^"]+)":.*?(?:Got|Given) value: (?P<value>.*)', re.DOTALL)
_MISSING = re.compile(r"the following arguments are required: (.*)")
_NO_MAPPING = re.compile(r"Unexpected config: (.*)", re.DOTALL)
_WORDS: dict[Any, str] = {int: "an integer", float: "a number", str: "text", bool: "true or false"}


class UsageError(Exception):
    """An option is unknown or has an invalid value; the message names it and says what to do.

    Neither a `ValueError` nor a `TypeError`, whose messages argparse replaces.
    """


def option(default: Any = MISSING, help: str = "", *, least: int | None = None, repeat: bool = False) -> Any:
    """A field of a dataclass of options.

    Args:
        default: Default value; without one, the option is required.
        help: Text for `--help`.
        least: Smallest value allowed.
        repeat: Whether each occurrence of the flag adds one item; otherwise commas separate the items of a tuple.
    """
    return field(default=default, metadata={"help": help, "least": least, "repeat": repeat})


def command(main: Callable[[Sequence[str]], int]) -> Callable[..., int]:
    """Make `main(arguments)` the entry point of a recipe.

    The arguments default to `sys.argv`; see `exit_status` for exceptions.
    """

    @functools.wraps(main)
    def entry_point(arguments: Sequence[str] | None = None) -> int:
        return exit_status(lambda: main(sys.argv[1:] if arguments is None else arguments))

    return entry_point


def exit_status(action: Callable[[], int]) -> int:
    """The exit status of a recipe, which prints what it refuses as one line on stderr.

    Args:
        action: The recipe, which returns its exit status.

    Returns:
        The status of the recipe; 2 after a usage error, and 1 after an exception that is a message for the user (see
        `refusal`) or a torchvision that cannot be loaded. A defect keeps its traceback.
    """
    try:
        return action()
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Exception as error:
        try:
            if isinstance(error, (ImportError, RuntimeError)):
                raise_for_torchvision(error)
        except ImportError as explained:
            sentence = str(explained)
        else:
            sentence = refusal(error)
        if not sentence:
            raise
        print(f"error: {sentence}", file=sys.stderr)
        return 1


def parse(options: type[T], arguments: Sequence[str], *, program: str, description: str) -> T:
    """Parse options; flags override `--config FILE`, which overrides the defaults.

    Args:
        options: Frozen dataclass whose fields are made with `option`; fields that are such dataclasses nest.
        arguments: Command line without the program's name.
        program: Name of the program in `--help`.
        description: Text above the options in `--help`.

    Raises:
        UsageError: If an option is unknown, missing or has an invalid value.
        SystemExit: If `--help` or `--print-config` is given, with status 0.
    """
    parser = ArgumentParser(
        prog=program,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        exit_on_error=False,
        allow_abbrev=False,
        print_config="--print-config",
    )
    parser.add_argument("--config", action="config", metavar="FILE", help="YAML file of options; flags override it")
    hints = {}
    for name, entry, hint in _leaves(options):
        hints[name] = hint
        _add(parser, name, entry, hint)
    try:
        found = parser.parse_args(list(arguments))
    except argparse.ArgumentError as error:
        raise UsageError(_sentence(str(error), hints)) from None
    made = _made(options, found.as_dict())
    check_bounds(made)
    return made


def convert(name: str, hint: Any, value: Any) -> Any:
    """Convert a value to a type, as `parse` does.

    Args:
        name: Name of the option, for error messages.
        hint: Target type.
        value: Text of the command line, or a value of a YAML file.

    Raises:
        UsageError: If the value is not of that type.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=hint)
    try:
        text = isinstance(value, str)
        found = parser.parse_args([f"--value={value}"]) if text else parser.parse_object({"value": value})
        return parser.instantiate(found)["value"]
    except argparse.ArgumentError as error:
        raise UsageError(_sentence(str(error), {"value": hint}, name)) from None
    except (TypeError, ValueError) as error:  # of a class that the value names
        raise UsageError(f"{name}: {_one_line(str(error))}") from None


def check_bounds(options: Any, prefix: str = "") -> None:
    """Check numbers against the smallest value that their option allows, in nested options too.

    Args:
        options: Instance of a dataclass of options.
        prefix: Dotted name of the field that holds it.

    Raises:
        UsageError: If a number is too small; the message names the flag.
    """
    for entry in fields(options):
        value, name = getattr(options, entry.name), prefix + entry.name
        if is_dataclass(value):
            check_bounds(value, f"{name}.")
        elif (least := entry.metadata["least"]) is not None and value is not None and value < least:
            raise UsageError(f"{_flag(name)} must be at least {least}, got {value}")


def option_lines(options: type) -> list[str]:
    """Flag and type of each option, one line each, in order."""
    return [f"{_flag(name)}  {_type_name(hint)}" for name, _, hint in _leaves(options)]


def nearest(name: str, known: Iterable[str]) -> str:
    """A suggestion (", did you mean X?") for an error message about an unknown name; empty if no name is similar."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f", did you mean {close[0]}?" if close else ""


def _leaves(options: type, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Name, field and type of all options; those of nested dataclasses have dotted names."""
    hints = typing.get_type_hints(options)
    for entry in fields(options):
        name, hint = prefix + entry.name, hints[entry.name]
        if isinstance(hint, type) and is_dataclass(hint):
            yield from _leaves(hint, f"{name}.")
        else:
            yield name, entry, hint


def _add(parser: ArgumentParser, name: str, entry: Any, hint: Any) -> None:
    flag, text = _flag(name), entry.metadata["help"].replace("%", "%%")
    if entry.default is MISSING:
        parser.add_argument(flag, type=hint, required=True, metavar=_metavar(hint), help=text)
        return
    if bool in _alternatives(hint):
        action, to_boolean = argparse.BooleanOptionalAction, _boolean(flag, hint)
        parser.add_argument(flag, action=action, type=to_boolean, default=entry.default, help=text)
        return
    default: Any = entry.default
    if typing.get_origin(hint) is tuple:
        repeat, item = entry.metadata["repeat"], typing.get_args(hint)[0]
        default = list(entry.default)
        text += f" (default: {','.join(map(str, default))})" if default else ""
        parser.add_argument(
            flag,
            action="extend" if repeat else "store",
            type=_items(flag, split=not repeat),
            default=default,
            metavar=_metavar(item) if repeat else f"{_metavar(item)},...",
            help=text,
        )
        return
    text += "" if default is None else f" (default: {default})"
    parser.add_argument(flag, type=hint, default=default, metavar=_metavar(hint), help=text)


def _boolean(flag: str, hint: Any) -> Callable[[Any], bool | None]:
    def convert(value: Any) -> bool | None:
        if not isinstance(value, _alternatives(hint)):
            raise UsageError(f"{flag} must be true or false, got {value!r}")
        return value

    return convert


def _items(flag: str, *, split: bool) -> Callable[[Any], list[Any]]:
    """The parser of a flag with several values: text on the command line, a list in a YAML file."""

    def convert(value: Any) -> list[Any]:
        if isinstance(value, str):
            value = [part.strip() for part in value.split(",") if part.strip()] if split else [value]
        if not isinstance(value, list):
            raise UsageError(f"{flag} must be a list, got {value!r}")
        return value

    return convert


def _made(options: type[T], values: Mapping[str, Any], prefix: str = "") -> T:
    hints = typing.get_type_hints(options)
    made = {}
    for entry in fields(options):  # type: ignore[arg-type]  # a dataclass
        value, hint, name = values[entry.name], hints[entry.name], prefix + entry.name
        if isinstance(hint, type) and is_dataclass(hint):
            value = _made(hint, value, f"{name}.")
        elif typing.get_origin(hint) is tuple:
            item = typing.get_args(hint)[0]
            value = tuple(convert(f"each value of {_flag(name)}", item, part) for part in value)
        made[entry.name] = value
    return options(**made)


def _sentence(message: str, hints: Mapping[str, Any], name: str | None = None) -> str:
    """An error message of jsonargparse as one line that names the flag, or `name`."""
    if found := _UNKNOWN.match(message):
        given = found[1] or _flag(found[2])
        if not given.startswith("--"):
            return f"unexpected argument {given!r}; options begin with --, and --help lists them"
        flag = given.partition("=")[0]
        return f"unknown option {flag}{nearest(flag, map(_flag, hints))}; --help lists all"
    if (found := _REFUSED.match(message)) and found["name"] in hints:
        return (
            f"{name or _flag(found['name'])} must be {_expected(hints[found['name']])}, got {_one_line(found['value'])}"
        )
    if found := _MISSING.match(message):
        return f"{' and '.join(map(_flag, found[1].split(', ')))} must be given"
    if found := _NO_MAPPING.match(message):
        return f"--config must name a file of `option: value` lines, found {_one_line(found[1])!r}"
    return _one_line(re.sub(r'^Parser key "([^"]+)":', lambda found: f"{name or _flag(found[1])}:", message))


def _expected(hint: Any) -> str:
    parts = [part for part in _alternatives(hint) if part is not type(None)]
    if typing.get_origin(parts[0]) is Literal:
        return f"one of {', '.join(map(str, typing.get_args(parts[0])))}"
    return " or ".join(_WORDS.get(part, "a mapping") for part in parts)


def _alternatives(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)


def _metavar(hint: Any) -> str:
    """The type in capitals, or the choices."""
    kind = _alternatives(hint)[0]
    if typing.get_origin(kind) is Literal:
        return "{" + ",".join(map(str, typing.get_args(kind))) + "}"
    return kind.__name__.upper()


def _type_name(hint: Any) -> str:
    """A type as it is written in the source code, independent of the version of Python."""
    if len(parts := _alternatives(hint)) > 1:
        return " | ".join(map(_type_name, parts))
    if typing.get_origin(hint) is tuple:
        return f"tuple[{_type_name(typing.get_args(hint)[0])}, ...]"
    if hint is type(None):
        return "None"
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint).replace("typing.", "")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _one_line(text: str) -> str:
    return " ".join(text.split())
