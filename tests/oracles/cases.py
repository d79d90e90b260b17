"""The two layouts of the toy model, and the ways in which a model may arrange the examples of a batch."""

from __future__ import annotations

import pytest

from bmoe_lightning.curvature import collect_factors
from bmoe_lightning.experts import find_expert_layers
from bmoe_lightning.laplace import LaplacePosterior
from oracles.models import (
    answer_logits,
    as_modules,
    choice_batch,
    choices_by_class,
    choices_by_example,
    choices_one_call_each,
    choices_permuted,
    packed_logits,
    toy_batch,
    toy_model,
)

FULL = 100  # a rank beyond every width
layouts = pytest.mark.parametrize("layout", ["fused", "modules"])

# What runs the model on a batch, and the batch.
ARRANGEMENTS = {
    "one row an example": (answer_logits, toy_batch),
    "right padding": (answer_logits, lambda: toy_batch(pad="right")),
    "choices of an example together": (choices_by_example, choice_batch),
    "all first choices, then all second": (choices_by_class, choice_batch),
    "rows in any order": (choices_permuted, choice_batch),
    "one call a choice": (choices_one_call_each, choice_batch),
    "two examples a row": (packed_logits, lambda: toy_batch(num_rows=6)),
}


def in_layout(model, layout):
    """A fused toy model, or a copy of it with one module for each expert."""
    return model if layout == "fused" else as_modules(model)


def built(layout, **config):
    """The fused toy model, and the same model in a layout."""
    fused = toy_model(**config)
    return fused, in_layout(fused, layout)


def built_with_layers(layout, **config):
    """As `built`, with the expert layers of the second model."""
    fused, model = built(layout, **config)
    return fused, model, find_expert_layers(model)


def answers(model, layers=None):
    """Factors of rank 3 of a batch, and the logit covariance of the same batch under them."""
    batch = toy_batch()
    factors = collect_factors(model, answer_logits, [batch], rank=3, layers=layers)
    return factors, LaplacePosterior(factors).logit_covariance(model, answer_logits, batch)[1]


def covariance(model, layers=None):
    """The logit covariance of `answers`."""
    return answers(model, layers)[1]
