import torch

from bmoe_lightning.laplace.present import of_classes, present_first

INF = torch.inf


def test_present_classes_come_first_in_order():
    logits = torch.tensor([[-INF, 2.0, -INF, 1.0, 3.0], [5.0, -INF, 4.0, -INF, -INF]])
    found = present_first(logits)
    assert found.tolist() == [[1, 3, 4], [0, 2, 1]]
    assert of_classes(logits, found).tolist() == [[2.0, 1.0, 3.0], [5.0, 4.0, -INF]]
    pairs = torch.arange(2 * 5 * 3).view(2, 5, 3)
    assert torch.equal(of_classes(pairs, found)[1], pairs[1, [0, 2, 1]])


def test_all_classes_and_no_examples():
    assert present_first(torch.zeros(2, 3)).tolist() == [[0, 1, 2]] * 2
    assert present_first(torch.zeros(0, 3)).shape == (0, 3)
