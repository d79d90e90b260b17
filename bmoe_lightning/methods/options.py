"""Options of methods: fields of their dataclasses with a help text, as files, tables and the command line have them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, Field, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bmoe_lightning.curvature.spec import Curvature, LayerSelection

if TYPE_CHECKING:
    from bmoe_lightning.methods.base import Method

_PREDICTION_ONLY = "prediction_only"
_TRIAL = "trial"


def option(default: Any, help: str, *, prediction_only: bool = False, trial: Any = None) -> Any:
    """Define an option of a method: a dataclass field with a default and a help text.

    Args:
        default: Default value.
        help: Help text, one sentence.
        prediction_only: Whether the option affects predictions only, so that a fit with another value is reused.
        trial: Cheaper value for a run that only checks that everything works (see `trial_options`); None keeps the
            default.
    """
    return field(default=default, metadata={"help": help, _PREDICTION_ONLY: prediction_only, _TRIAL: trial})


def affects_predictions_only(entry: Field[Any]) -> bool:
    """Whether an option, given as the field of a method, affects predictions only."""
    return bool(entry.metadata.get(_PREDICTION_ONLY))


def plain(value: Any) -> Any:
    """An option as a JSON value.

    Raises:
        TypeError: If it is not JSON-serialisable.
    """
    if isinstance(value, (Curvature, LayerSelection)):
        return value.description()
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, Path):
        return str(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(
        f"the option {value!r} is a {type(value).__name__}, which cannot be stored in a file; use numbers, strings, "
        "paths, curvatures, and lists and mappings of these"
    )


def option_table(method: type[Method]) -> list[tuple[str, str, str]]:
    """Name, default and help of each option of a method, for help texts and docs."""
    rows = []
    for entry in fields(method):
        default = "" if entry.default is MISSING else repr(entry.default)
        rows.append((entry.name, default, entry.metadata.get("help", "")))
    return rows


def trial_options(method: type[Method]) -> dict[str, Any]:
    """The options with a cheaper value for a run that only checks that everything works, with these values.

    Args:
        method: Class of the method.
    """
    return {entry.name: entry.metadata[_TRIAL] for entry in fields(method) if entry.metadata.get(_TRIAL) is not None}


def option_columns(method: Method) -> dict[str, bool | int | float | str]:
    """The options of a method as columns of a table, those of its curvature by their names; unset ones are omitted.

    Args:
        method: The method.
    """
    columns: dict[str, bool | int | float | str] = {}
    for name, value in method.options().items():
        entries = value if isinstance(value, Mapping) else {name: value}
        columns |= {key: entry for key, entry in entries.items() if isinstance(entry, (bool, int, float, str))}
    columns.pop("label", None)
    return columns
