"""The methods of a run: looked up by name, with options from `--set` and YAML files."""

from __future__ import annotations

import typing
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

from bmoe_lightning.curvature.spec import Curvature
from bmoe_lightning.methods.base import CurvatureMethod, Method, check_method_names
from bmoe_lightning.methods.needs import Available, check_needs
from bmoe_lightning.methods.options import trial_options
from bmoe_lightning.methods.registry import get_method
from recipes.common.cli import UsageError, convert, nearest
from recipes.qwen_obqa.method_names import ALL, assignment, check_among, listed_methods
from recipes.qwen_obqa.settings import ResolvedSettings
from recipes.qwen_obqa.zero_shot import ZERO_SHOT

_DROPOUT = "p"


@dataclass(frozen=True)
class _Given:
    """The value of an option, and its origin for error messages."""

    value: Any
    place: str


_Tree = dict[str, Any]
"""Options by name: a `_Given`, or the nested options of a dataclass."""


def run_curvature(settings: ResolvedSettings) -> Curvature:
    """Curvature of the methods that specify none."""
    chosen = settings.curvature
    return Curvature(rank=chosen.rank, fisher=chosen.fisher, sketch=chosen.sketch)


def build_methods(settings: ResolvedSettings) -> tuple[Method, ...]:
    """Build the methods of a run.

    Two options default to the settings of the run: the curvature, and the expert dropout of methods that predict with
    it. A dry run has the cheaper defaults of `trial_options`.

    Args:
        settings: Resolved settings.

    Raises:
        UsageError: If there is no such method or option, a value is invalid, or the run lacks what a method needs.
    """
    curvature = run_curvature(settings)
    chosen = [_looked_up(entry, curvature) for entry in _applicable(settings)]
    given = _assignments(settings.set, [method.name for method, _ in chosen])
    methods = [
        _with_options(method, given.get(method.name, {}), f"--set {method.name}", {"curvature": curvature})
        for method, _ in chosen
    ]
    try:
        check_method_names([*methods, *([ZERO_SHOT] if settings.zero_shot else [])])
        # Further fine-tuning runs are made by the recipe.
        available = Available(
            snapshots=settings.epochs,
            expert_dropout=settings.expert_dropout,
            runs=True,
            lora=settings.train == "lora",
        )
        check_needs(methods, available)
    except ValueError as error:
        raise UsageError(f"--methods: {error}") from None
    return tuple(
        _filled(method, args | set(given.get(looked_up.name, {})), settings)
        for method, (looked_up, args) in zip(methods, chosen, strict=True)
    )


def _applicable(settings: ResolvedSettings) -> Iterator[str | dict[str, Any]]:
    """The entries of `--methods`; `all` stands for the registered methods that suit what is trained.

    A posterior over experts, or noise on their routers, suits a run that trains experts, and a posterior over LoRA's
    matrices one that trains these. Methods that train routers have to be named: together they take longer than the run.
    """
    for entry in settings.methods:
        for name in listed_methods([entry]):
            if entry != ALL or _suits(_found(str(name)), settings):
                yield name


def _suits(method: Method, settings: ResolvedSettings) -> bool:
    if method.needs.router_training:
        return False
    if settings.train == "lora":
        return method.needs.lora or not (isinstance(method, CurvatureMethod) or method.needs.routers)
    return not method.needs.lora


def _looked_up(entry: str | dict[str, Any], curvature: Curvature) -> tuple[Method, frozenset[str]]:
    """A method, and the names of the options in its YAML entry."""
    if isinstance(entry, str):
        return _found(entry), frozenset()
    path, args = entry.get("class_path"), entry.get("init_args", {})
    if not isinstance(path, str) or not isinstance(args, dict) or set(entry) - {"class_path", "init_args"}:
        raise UsageError(f"an item of methods must be a name or {{class_path: ..., init_args: {{...}}}}, got {entry}")
    method = _found(":".join(path.rsplit(".", 1)))
    return _with_options(method, _tree(args, path), path, {"curvature": curvature}), frozenset(args)


def _found(name: str) -> Method:
    try:
        return get_method(name)
    except (ValueError, TypeError) as error:
        raise UsageError(f"--methods: {error}") from None


def _tree(args: Mapping[str, Any], place: str) -> _Tree:
    """The options of a YAML file; a mapping holds the options of a dataclass, unless it has a `class_path`."""
    return {
        name: _tree(value, f"{place}.{name}")
        if isinstance(value, dict) and "class_path" not in value
        else _Given(value, f"{place}.{name}")
        for name, value in args.items()
    }


def _assignments(texts: Sequence[str], methods: Sequence[str]) -> dict[str, _Tree]:
    """The options of `--set METHOD.OPTION=VALUE` by method; the last value of an option wins."""
    given: dict[str, _Tree] = {}
    for text in texts:
        path, method, names, value = assignment(text)
        check_among(path, method, methods)
        tree = given.setdefault(method, {})
        for name in names[:-1]:
            inner = tree.get(name)
            tree[name] = tree = inner if isinstance(inner, dict) else {}
        tree[names[-1]] = _Given(value, f"--set {path}")
    return given


def _filled(method: Method, given: Collection[str], settings: ResolvedSettings) -> Method:
    """The method with its defaults from the run: the dropout of training, the curvature, and what a dry run saves."""
    try:
        if method.needs.expert_dropout and _DROPOUT in _option_names(method) and _DROPOUT not in given:
            dropout: dict[str, Any] = {_DROPOUT: settings.expert_dropout}
            method = replace(method, **dropout)
        if settings.dry_run:
            cheaper = trial_options(type(method))
            method = replace(method, **{name: value for name, value in cheaper.items() if name not in given})
        return method.with_defaults(run_curvature(settings))
    except ValueError as error:
        raise UsageError(f"--methods: {method.name}: {error}") from None


def _with_options(instance: Any, given: _Tree, place: str, defaults: Mapping[str, Any]) -> Any:
    """A copy of a dataclass with some options replaced.

    Args:
        instance: Frozen dataclass.
        given: Options by name.
        place: Origin of the options, for error messages.
        defaults: Values of fields that are None, so that nested options of theirs can be set.
    """
    hints, names, changes = typing.get_type_hints(type(instance)), _option_names(instance), {}
    for name, value in given.items():
        if name not in names:
            raise UsageError(f"{place} has no option {name!r}{nearest(name, names)}; there are {', '.join(names)}")
        if isinstance(value, _Given):
            changes[name] = convert(value.place, hints[name], value.value)
            continue
        inner = getattr(instance, name)
        inner = defaults.get(name) if inner is None else inner
        if not is_dataclass(inner):
            raise UsageError(
                f"{place}.{name} is a single value without options {', '.join(map(repr, value))}; set it directly"
            )
        changes[name] = _with_options(inner, value, f"{place}.{name}", {})
    try:
        return replace(instance, **changes)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{place}: {error}") from None


def _option_names(instance: Any) -> list[str]:
    return [entry.name for entry in fields(instance) if entry.init]
