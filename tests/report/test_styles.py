import pytest

from bmoe_lightning.report.styles import REFERENCE, method_styles


def names(count):
    return [f"method_{i}" for i in range(count)]


@pytest.mark.parametrize("count", [1, 10, 30, 325])
def test_no_two_methods_look_the_same(count):
    styles = method_styles(names(count))
    assert list(styles) == names(count)
    assert len(set(styles.values())) == count


def test_up_to_ten_differ_in_colour_and_in_marker():
    styles = method_styles(names(10)).values()
    assert len({style.color for style in styles}) == len({style.marker for style in styles}) == 10


@pytest.mark.parametrize("count", [30, 82])
def test_colour_is_never_all_that_tells_two_apart(count):
    # In print, or for somebody who sees no colours: marker and line are what is left.
    styles = list(method_styles(names(count)).values())
    for first in range(9):
        same_color = [style for style in styles[1:] if style.color == styles[1 + first].color]
        assert len({style.marker for style in same_color}) == len(same_color)


def test_the_first_is_the_reference_and_further_ones_change_no_style():
    assert method_styles(names(3))["method_0"] == REFERENCE
    longer = method_styles(names(40))
    assert {name: longer[name] for name in names(12)} == method_styles(names(12))


def test_a_name_that_is_there_twice_takes_one_place():
    assert method_styles(["a", "b", "a", "c"]) == method_styles(["a", "b", "c"])


def test_the_palette_is_told_apart_with_every_common_colour_blindness():
    # Viénot, Brettel and Mollon 1999 (https://doi.org/10.1002/(SICI)1520-6378(199908)24:4<243::AID-COL5>3.0.CO;2-3).
    protan = ((0.11238, 0.88762, 0), (0.11238, 0.88762, 0), (0.00401, -0.00401, 1))
    deutan = ((0.29275, 0.70725, 0), (0.29275, 0.70725, 0), (-0.02234, 0.02234, 1))
    colors = [style.color for style in method_styles(names(10)).values()]
    for matrix in (protan, deutan):
        seen = [seen_as(color, matrix) for color in colors]
        closest = min(distance(a, b) for i, a in enumerate(seen) for b in seen[:i])
        assert closest > 0.07  # matplotlib's own palette has colours .03 apart


def seen_as(color, matrix):
    """A colour in linear RGB, as a dichromat sees it."""
    linear = [_linear(int(color[i : i + 2], 16) / 255) for i in (1, 3, 5)]
    return [sum(weight * value for weight, value in zip(row, linear, strict=True)) for row in matrix]


def distance(first, second):
    return sum((a - b) ** 2 for a, b in zip(first, second, strict=True)) ** 0.5


def _linear(value):
    return value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4
