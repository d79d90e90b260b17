"""What a study knows of its random routers beside predictions, on disk, so that its report needs no model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bmoe_lightning.methods import Method
from bmoe_lightning.methods.router_method import ChosenRoutersMethod
from bmoe_lightning.methods.routing_cost import routing_cost
from bmoe_lightning.routers.types import Router
from bmoe_lightning.utils.file_header import damaged
from bmoe_lightning.utils.json_io import read_json_file, write_json_file

ROUTES_FILE = "routes.json"
_FORMAT = "random routers of a study"
_VERSION = 1
_REMEDY = "run the command that made it again, which repeats no finished run"


@dataclass(frozen=True)
class Counted:
    """The counted cost of a prediction.

    Attributes:
        passes: Number of forward passes.
        macs: Multiply-adds of a token in all routers, in each of them, beyond those of the model.
        parameters: Numbers that are stored for all routers.
    """

    passes: int
    macs: int
    parameters: int


@dataclass(frozen=True)
class Routes:
    """The random routers of a study.

    Attributes:
        names: Methods with random routers, untrained noise first.
        layers: Names of the expert layers.
        susceptible: Indices of those whose routes change most under noise.
        selections: By the name of a selection of layers, its label and indices.
        active_macs: Multiply-adds of one token in the model, without attention scores.
        counted: Counted costs by row; of the methods that count.
        num_questions: Number of questions on which the stability was measured.
    """

    names: tuple[str, ...]
    layers: tuple[str, ...]
    susceptible: tuple[int, ...]
    selections: Mapping[str, tuple[str, tuple[int, ...]]]
    active_macs: int
    counted: Mapping[str, Counted]
    num_questions: int


def count_costs(methods: Sequence[Method], routers: Sequence[Router]) -> dict[str, Counted]:
    """Count what the predictions of methods take in all routers that they replace.

    Args:
        methods: Methods.
        routers: All routers of the model.
    """
    found = {}
    for method in methods:
        chosen = _chosen(method, routers) if isinstance(method, ChosenRoutersMethod) else routers
        costs = [c for r in chosen if (c := routing_cost(method, r.d_in, r.num_experts)) is not None]
        if costs:
            macs, parameters = sum(cost.per_token.total for cost in costs), sum(cost.parameters for cost in costs)
            found[method.name] = Counted(max(cost.passes for cost in costs), macs, parameters)
    return found


def _chosen(method: ChosenRoutersMethod, routers: Sequence[Router]) -> list[Router]:
    """The routers that a method replaces, whose names have a prefix where a module holds the model."""
    names = tuple(f".{layer}" for layer in method.layers if isinstance(layer, str))
    return [
        router
        for router in routers
        if not method.layers or router.index in method.layers or any(n.endswith(f".{router.name}") for n in names)
    ]


def write_routes(output: Path, routes: Routes) -> None:
    """Write the file atomically.

    Args:
        output: Folder of the study.
        routes: What is written.
    """
    write_json_file(output / ROUTES_FILE, format=_FORMAT, version=_VERSION, description=asdict(routes))


def read_routes(output: Path) -> Routes:
    """Read the file.

    Args:
        output: Folder of the study.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is damaged.
    """
    path = output / ROUTES_FILE
    try:
        content = read_json_file(path, format=_FORMAT, version=_VERSION, remedy=_REMEDY).description
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{output} holds no finished study of routers; check the path, or make the study first"
        ) from None
    try:
        return _routes(content)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise damaged(path, _FORMAT, f"it is incomplete ({error!r})", _REMEDY) from error


def _routes(content: Mapping[str, Any]) -> Routes:
    return Routes(
        names=tuple(content["names"]),
        layers=tuple(content["layers"]),
        susceptible=tuple(content["susceptible"]),
        selections={name: (label, tuple(indices)) for name, (label, indices) in content["selections"].items()},
        active_macs=int(content["active_macs"]),
        counted={row: Counted(**found) for row, found in content["counted"].items()},
        num_questions=int(content["num_questions"]),
    )
