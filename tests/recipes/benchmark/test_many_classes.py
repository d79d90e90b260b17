"""The table of what compact covariance terms cost."""

from recipes.benchmark.many_classes import ValidationSet, _line


def test_a_line_has_two_sizes_and_two_losses_that_agree():
    cells = _line(ValidationSet(8, num_examples=32)).strip("| ").split(" | ")
    classes, exact, compact, exact_nll, compact_nll = (float(cell) for cell in cells[:5])
    assert classes == 8
    assert compact < exact / 5
    assert abs(compact_nll - exact_nll) < 0.02
