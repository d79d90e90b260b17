"""The methods of the study: the controls, and every registered method that replaces router logits.

Variants are made from the options that methods have: what is averaged (`average`), no samples at all, which is the mean
of a random router (`num_samples` of 0), and the layers whose routers are random (`layers`). A method without such an
option has no such variant.
"""

from __future__ import annotations

import typing
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import yaml

from bmoe_lightning.methods.base import Method
from bmoe_lightning.methods.registry import get_method, method_names
from bmoe_lightning.methods.routing_cost import routing_cost
from recipes.common.cli import UsageError
from recipes.qwen_obqa.method_names import assignment
from recipes.routers.gates import GATES

Entry = str | dict[str, Any]
"""An item of `--methods` of the main job: a name, or a class with its options."""

_ALL = "all"
_AVERAGE, _LAYERS, _SAMPLES = "average", "layers", "num_samples"


@dataclass(frozen=True)
class Known:
    """The methods that the study knows by name; see `methods.yaml`.

    Attributes:
        reference: The fine-tuned model.
        noise: Untrained noise on router logits.
        plain: Methods without random routers.
        trained_routers: Router weights that were trained without noise; None if there is no such method.
    """

    reference: str
    noise: str
    plain: tuple[str, ...]
    trained_routers: Entry | None = None

    @property
    def trained_name(self) -> str | None:
        """The name of the row of `trained_routers`."""
        entry = self.trained_routers
        return str(entry["init_args"]["name"]) if isinstance(entry, dict) else entry


def read_known(path: Path | None = None) -> Known:
    """Read the file.

    Args:
        path: YAML file; by default `methods.yaml` in this folder.
    """
    content = yaml.safe_load((path or Path(__file__).with_name("methods.yaml")).read_text(encoding="utf-8"))
    return Known(**{**content, "plain": tuple(content["plain"])})


@dataclass(frozen=True)
class Selection:
    """Which layers have random routers.

    Attributes:
        name: Name in the names of methods.
        label: Name in words.
        indices: Indices of the expert layers.
    """

    name: str
    label: str
    indices: tuple[int, ...]


def random_router_names(names: Sequence[str], known: Known) -> list[str]:
    """The names of the methods with random routers, untrained noise first.

    Args:
        names: Names as in `--methods`, or `all`.
        known: Methods that are known by name.

    Raises:
        UsageError: If there is no method of a name, or it replaces no router logits.
    """
    registered = [name for name in method_names() if get_method(name).needs.routers]
    chosen = [found for name in names for found in (registered if name == _ALL else [name])]
    for name in chosen:
        try:
            method = get_method(name)
        except (ValueError, TypeError) as error:
            raise UsageError(f"--methods: {error}") from None
        if not method.needs.routers:
            raise UsageError(
                f"--methods: {name} replaces no router logits, and this study compares methods that do; give one of "
                f"{', '.join(registered)}"
            )
    # Routers that were trained without noise are a control of every study.
    return [name for name in dict.fromkeys([known.noise, *chosen]) if name != known.trained_routers]


def entries(names: Sequence[str], known: Known, num_samples: int | None) -> list[Entry]:
    """The methods of a study on all layers.

    Args:
        names: Methods with random routers, see `random_router_names`.
        known: Methods that are known by name.
        num_samples: Number of samples of those that sample; None for their defaults.
    """
    found: list[Entry] = [*known.plain, GATES]
    if known.trained_routers is not None:
        found.append(known.trained_routers)
    for name in names:
        method = get_method(name)
        found.append(_entry(method, {}, num_samples))
        found += [_entry(method, options, num_samples) for options in _variants(method)]
    return found


def layer_entries(names: Sequence[str], selections: Sequence[Selection], num_samples: int | None) -> list[Entry]:
    """Methods with random routers in some layers alone: the first that can of the untrained and of the trained ones.

    Untrained noise in the same layers is the control for routers that are trained.

    Args:
        names: Methods with random routers.
        selections: Which layers.
        num_samples: As for `entries`.
    """
    able = [method for method in map(get_method, names) if _has(method, _LAYERS)]
    first = {method.needs.training_labels: method for method in reversed(able)}
    methods = [method for method in able if method in first.values()]
    return [_entry(method, _selected(method, selection), num_samples) for method in methods for selection in selections]


def with_variants(assignments: Sequence[str], entries: Sequence[Entry], names: Sequence[str]) -> tuple[str, ...]:
    """Assignments to options of methods, and the same to their variants, which compare what is averaged or where.

    Args:
        assignments: As of `--set`, in order; those to a variant itself come last.
        entries: The methods of a run.
        names: Methods with random routers.

    Raises:
        UsageError: If an assignment is malformed.
    """
    found = []
    for text in assignments:
        _, method, options, value = assignment(text)
        for entry in entries:
            own = {} if isinstance(entry, str) else entry["init_args"]
            variant = own.get("name", method)
            if method in names and variant != method and base_of(variant, names) == method and options[0] not in own:
                found.append(f"{variant}.{'.'.join(options)}={value}")
    return (*found, *assignments)


def few_samples(method: Method, limit: int) -> Method:
    """The method with no more samples, if each takes a forward pass of its own; otherwise as it is.

    Args:
        method: Method.
        limit: Largest number of samples.
    """
    cost = routing_cost(method, 1, 1) if _has(method, _SAMPLES) else None
    if cost is None or cost.passes <= limit:
        return method
    changed: dict[str, Any] = {_SAMPLES: limit}
    return replace(method, **changed)


def base_of(name: str, names: Sequence[str]) -> str | None:
    """The method that a row is a variant of, or is; None if it is none of these.

    Args:
        name: Name of the row.
        names: Methods with random routers.
    """
    found = [base for base in names if name == base or name.startswith(f"{base}_")]
    return max(found, key=len, default=None)


def selections(num_layers: int, susceptible: Sequence[int]) -> list[Selection]:
    """The layers that are compared with all of them.

    Args:
        num_layers: Number of expert layers of the model.
        susceptible: Indices of those whose routes change most under noise.
    """
    third = len(susceptible)
    found = [
        Selection("susceptible", "susceptible layers", tuple(susceptible)),
        Selection("last", "last layer", (num_layers - 1,)),
        Selection("last_third", "last third", tuple(range(num_layers - third, num_layers))),
    ]
    different: dict[tuple[int, ...], Selection] = {}
    for selection in found:
        if len(selection.indices) < num_layers:
            different.setdefault(selection.indices, selection)
    return list(different.values())


def _variants(method: Method) -> Iterator[dict[str, Any]]:
    """The options of the variants that average something else than the method does by default, or no sample."""
    if _has(method, _AVERAGE):
        for choice in typing.get_args(typing.get_type_hints(type(method))[_AVERAGE]):
            if choice != getattr(method, _AVERAGE):
                yield {_AVERAGE: choice, **_named(method, choice, f" ({choice})")}
    if _has(method, _SAMPLES) and method.needs.training_labels:  # without training, the mean is the model
        options = {_SAMPLES: 0, **_named(method, "mean", " (mean)")}
        with suppress(ValueError):  # of a method that has no mean of its own
            replace(method, **options)
            yield options


def _named(method: Method, name: str, label: str) -> dict[str, Any]:
    return {"name": f"{method.name}_{name}", "label": f"{method.label}{label}"}


def _selected(method: Method, selection: Selection) -> dict[str, Any]:
    return {_LAYERS: list(selection.indices), **_named(method, selection.name, f", {selection.label}")}


def _entry(method: Method, options: Mapping[str, Any], num_samples: int | None) -> Entry:
    given = dict(options)
    if num_samples is not None and _has(method, _SAMPLES):
        given.setdefault(_SAMPLES, num_samples)
    if not given:
        return method.name
    kind = type(method)
    return {"class_path": f"{kind.__module__}.{kind.__qualname__}", "init_args": given}


def _has(method: Method, option: str) -> bool:
    return any(entry.name == option for entry in fields(method))
