"""The map of layers x experts."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from bmoe_lightning.laplace import LayerAttribution
from bmoe_lightning.report import attribution_figure, attribution_map

LAYERS = (
    LayerAttribution(
        "a", 0, torch.tensor([[0.2, 0.0, 0.4], [0.6, 0.0, 0.0]]).double(), torch.tensor([[3, 0, 2], [5, 0, 0]])
    ),
    LayerAttribution("b", 2, torch.tensor([[0.1, 0.1], [0.3, 0.3]]).double(), torch.tensor([[1, 4], [2, 3]])),
)


def test_means_over_examples_and_sums_of_tokens():
    found = attribution_map(LAYERS)
    assert found.layers == (0, 2)
    assert found.variance[0].tolist() == pytest.approx([0.4, 0.0, 0.2])
    assert found.variance[1, :2].tolist() == pytest.approx([0.2, 0.2])
    assert found.slots[0].tolist() == [8, 0, 2]
    assert math.isnan(found.variance[1, 2])
    assert math.isnan(found.slots[1, 2])
    assert found.shares.tolist() == pytest.approx([0.6, 0.4])


def test_the_figure_has_both_maps_with_unseen_experts_left_out():
    figure = attribution_figure(LAYERS)
    panels = [ax for ax in figure.get_axes() if ax.images]
    assert [ax.get_title() for ax in panels] == ["mean variance of the centred logits", "routed tokens"]
    for ax, first in zip(panels, ([0.4, None, 0.2], [8, None, 2]), strict=True):
        drawn = ax.images[0].get_array()
        assert drawn.shape == (2, 3)
        assert drawn.filled(math.nan)[0].tolist() == pytest.approx(
            [math.nan if value is None else value for value in first], nan_ok=True
        )
    assert [label.get_text() for label in panels[0].get_yticklabels()] == ["0 (60 %)", "2 (40 %)"]


@pytest.mark.parametrize("experts", [(1,), (8,), (1, 1, 1), (8, 4, 2), (60,) * 24])
def test_all_text_is_within_the_figure_and_no_two_labels_overlap(experts):
    layers = [
        LayerAttribution(f"layer {index}", index, torch.rand(3, number).double(), torch.ones(3, number).long())
        for index, number in enumerate(experts)
    ]
    figure = attribution_figure(layers)
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()

    def box(text):
        return text.get_window_extent(renderer)

    panels = [ax for ax in figure.get_axes() if ax.images]
    texts = [text for ax in panels for text in (ax.title, ax.xaxis.label, *ax.get_xticklabels())]
    texts += [panels[0].yaxis.label, *panels[0].get_yticklabels()]
    for text in texts:
        assert figure.bbox.x0 <= box(text).x0 <= box(text).x1 <= figure.bbox.x1, text
        assert figure.bbox.y0 <= box(text).y0 <= box(text).y1 <= figure.bbox.y1, text
    assert not box(panels[0].title).overlaps(box(panels[1].title))
    for ax in panels:
        labels = [label.get_text() for label in ax.get_xticklabels()]
        assert [int(label) for label in labels] == sorted(set(range(max(experts))) & set(map(int, labels)))
        boxes = [box(label) for label in ax.get_xticklabels()]
        assert not any(one.overlaps(other) for one, other in pairwise(boxes))


def test_nothing_to_draw_is_refused():
    with pytest.raises(ValueError, match="nothing to draw"):
        attribution_figure(())
    empty = LayerAttribution("a", 0, torch.zeros(0, 3).double(), torch.zeros(0, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="at least one example"):
        attribution_figure((empty,))
