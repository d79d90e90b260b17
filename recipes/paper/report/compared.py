"""The methods that the report knows by name, and what is claimed of them: read from `compared.yaml`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from bmoe_lightning.metrics import get_metric

Claim = Literal["lower", "higher", "none"]
DataChoice = Literal["in_distribution", "shift"]
_FILE = Path(__file__).with_name("compared.yaml")


@dataclass(frozen=True)
class Bar:
    """A claim about a method.

    Attributes:
        title: Claim in words; `{parts}` stands for the number of parts of the layers.
        claim: Where the difference is claimed to be, relative to the margin.
        method: Row of the one method.
        others: Rows of the methods that it is compared with.
        data: Data sets of the comparison.
        metric: Name of the metric.
        relative: Whether the difference is divided by the metric of the other method.
        margin: Margin.

    Raises:
        ValueError: If the claim, the data or the metric are not among the choices, or the better one is asked for of a
            metric that has no order.
    """

    title: str
    claim: Claim
    method: str
    others: tuple[str, ...]
    data: DataChoice
    metric: str = "nll"
    relative: bool = False
    margin: float = 0.0

    @property
    def data_words(self) -> str:
        """The choice of data in words."""
        return self.data.replace("_", " ")

    def __post_init__(self) -> None:
        for name, found, choices in (("claim", self.claim, Claim), ("data", self.data, DataChoice)):
            if found not in get_args(choices):
                raise ValueError(f"{name} of the bar {self.title!r} is {found!r}; take one of {get_args(choices)}")
        if get_metric(self.metric).higher_is_better is None and self.claim == "none":
            raise ValueError(
                f"the bar {self.title!r} names the better one by {self.metric}, but neither higher nor lower values "
                "are better; take another metric, or claim a direction"
            )


@dataclass(frozen=True)
class Compared:
    """The methods that the report knows by name.

    Attributes:
        reference: Row that costs are relative to.
        order: Order of rows; others follow as they come.
        layers: Method of which parts of the layers are left out.
        prior: Labels of the posteriors that differ in how the prior precision is found.
        bars: What is claimed.
    """

    reference: str
    order: tuple[str, ...]
    layers: str
    prior: Mapping[str, str]
    bars: tuple[Bar, ...] = field(default=())

    def without_part(self, method: str) -> int | None:
        """Number of the part of the layers that a method leaves out, from 1; None if it is not of that kind.

        Args:
            method: Row.
        """
        found = re.fullmatch(rf"{re.escape(self.layers)}_without_(\d+)", method)
        return int(found[1]) if found else None

    def bars_of_parts(self, number: int) -> tuple[Bar, ...]:
        """The claims, those about parts of the layers for as many parts as there are.

        Args:
            number: Number of parts; 0 if there are none, and the claims are those about all parts.
        """

        def of_parts(bar: Bar) -> Bar:
            if self.without_part(bar.method) is None:
                return bar
            others = tuple(other for other in bar.others if not number or (self.without_part(other) or 0) <= number)
            return replace(bar, title=bar.title.format(parts=len(others) + 1), others=others)

        return tuple(map(of_parts, self.bars))


def read_compared(path: Path = _FILE) -> Compared:
    """Read the file.

    Args:
        path: YAML file.

    Raises:
        ValueError: If a choice is unknown.
        TypeError: If an entry is missing or unknown.
    """
    content: dict[str, Any] = yaml.safe_load(path.read_text())
    bars = tuple(Bar(**{**entry, "others": tuple(entry["others"])}) for entry in content.pop("bars"))
    return Compared(**{**content, "order": tuple(content["order"])}, bars=bars)
