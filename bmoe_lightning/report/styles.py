"""How methods are drawn: told apart by colour, marker and line, the same in every figure of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# Paul Tol's muted scheme (https://sronpersonalpages.nl/~pault/): told apart with every common kind of colour blindness,
# in print too.
_PALETTE = ("#332288", "#CC6677", "#117733", "#DDCC77", "#88CCEE", "#882255", "#44AA99", "#999933", "#AA4499")
_MARKERS = ("s", "^", "D", "v", "P", "X", "<", ">", "h")
_LINES = ("-", "--", "-.", ":")


@dataclass(frozen=True)
class MethodStyle:
    """How a method is drawn.

    Attributes:
        color: Colour of line and markers.
        marker: Marker, as matplotlib names it.
        linestyle: Line style, as matplotlib names it.
    """

    color: str
    marker: str
    linestyle: str = "-"


REFERENCE = MethodStyle("#222222", "o")
"""Near-black, for the method that the others are compared with."""


def method_styles(methods: Sequence[str]) -> dict[str, MethodStyle]:
    """A style for each method, by its place in the list; the first is the reference.

    With up to ten methods no two share a colour or a marker, and with up to 325 no two look the same.

    Args:
        methods: All methods of a run, in the order of its table: a part of them would get other styles.
    """
    names = list(dict.fromkeys(methods))
    return {name: REFERENCE if place == 0 else _style(place - 1) for place, name in enumerate(names)}


def _style(place: int) -> MethodStyle:
    # Each time round the palette, markers move on by one, so that no colour has the same marker again.
    turn, color = divmod(place, len(_PALETTE))
    return MethodStyle(_PALETTE[color], _MARKERS[(color + turn) % len(_MARKERS)], _LINES[turn % len(_LINES)])
