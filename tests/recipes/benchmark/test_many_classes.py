"""The table of what compact covariance terms cost."""

from recipes.benchmark.many_classes import ValidationSet, _large, _line


def test_a_line_has_two_sizes_and_two_losses_that_agree():
    cells = _line(ValidationSet(8, num_examples=32)).strip("| ").split(" | ")
    classes, exact, compact, exact_nll, compact_nll = (float(cell) for cell in cells[:5])
    assert classes == 8
    assert compact < exact / 5
    assert abs(compact_nll - exact_nll) < 0.02


def test_a_large_set_says_which_terms_it_has_and_what_they_take():
    few, many = (_large(ValidationSet(*sizes)) for sizes in ((3, 32), (12, 96)))
    assert few.startswith("32 examples, 3 classes, 2 layers: exact terms 0 MiB, LPO ")
    assert many.startswith("96 examples, 12 classes, 2 layers: compact terms ")
