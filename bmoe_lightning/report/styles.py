"""Plot styles of methods: distinct in colour, marker and line, and the same in every figure of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# Paul Tol's muted scheme (https://sronpersonalpages.nl/~pault/): distinct with every common kind of colour blindness,
# and in print.
_PALETTE = ("#332288", "#CC6677", "#117733", "#DDCC77", "#88CCEE", "#882255", "#44AA99", "#999933", "#AA4499")
_MARKERS = ("s", "^", "D", "v", "P", "X", "<", ">", "h")
_LINES = ("-", "--", "-.", ":")


@dataclass(frozen=True)
class MethodStyle:
    """The plot style of a method.

    Attributes:
        color: Colour of line and markers.
        marker: Marker of matplotlib.
        linestyle: Line style of matplotlib.
    """

    color: str
    marker: str
    linestyle: str = "-"


REFERENCE = MethodStyle("#222222", "o")
"""Near-black, for the reference method."""


def method_styles(methods: Sequence[str]) -> dict[str, MethodStyle]:
    """A style for each method, by its position in the list; the first is the reference.

    Up to ten methods differ in colour and marker, and up to 325 in some property.

    Args:
        methods: All methods of a run, in the order of its table: a subset would get other styles.
    """
    names = list(dict.fromkeys(methods))
    return {name: REFERENCE if place == 0 else _style(place - 1) for place, name in enumerate(names)}


def _style(place: int) -> MethodStyle:
    # With each pass over the palette the markers shift by one, so that no colour gets the same marker again.
    turn, color = divmod(place, len(_PALETTE))
    return MethodStyle(_PALETTE[color], _MARKERS[(color + turn) % len(_MARKERS)], _LINES[turn % len(_LINES)])
