"""Which AdamW weights in half precision get."""

from __future__ import annotations

import importlib.util
import sys

import pytest
import torch
from torch import nn

from bmoe_lightning.optim import MasterWeightAdamW, adamw, make_adamw

OPTIONS = {"lr": 1e-3, "betas": (0.9, 0.95), "weight_decay": 0.1}


def weights(*dtypes):
    return [nn.Parameter(torch.ones(4, 3, dtype=dtype)) for dtype in dtypes]


@pytest.mark.parametrize("updates", ["master_weights", "nearest"])
def test_float32_weights_get_torchs(updates):
    optimizer = make_adamw(weights(torch.float32), updates, **OPTIONS)
    assert type(optimizer) is torch.optim.AdamW
    group = optimizer.param_groups[0]
    assert {name: group[name] for name in OPTIONS} == OPTIONS


@pytest.mark.parametrize("dtypes", [[torch.bfloat16], [torch.float16], [torch.float32, torch.bfloat16]])
def test_half_precision_gets_a_copy_by_default(dtypes):
    optimizer = make_adamw(iter(weights(*dtypes)), **OPTIONS)
    assert type(optimizer) is MasterWeightAdamW
    assert {name: optimizer.param_groups[0][name] for name in OPTIONS} == OPTIONS
    assert type(make_adamw(weights(*dtypes), "nearest", **OPTIONS)) is torch.optim.AdamW


def test_unknown_choices_are_refused():
    with pytest.raises(ValueError, match="unknown half_precision_updates 'kahan'; valid are master_weights"):
        make_adamw(weights(torch.float32), "kahan", **OPTIONS)


def test_the_extra_is_named_where_it_is_missing(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(adamw, "find_spec", lambda name: None if name == "torchao" else find(name))
    with pytest.raises(ImportError, match=r"install the extra torchao .*, or use 'master_weights'"):
        make_adamw(weights(torch.bfloat16), "stochastic_rounding", **OPTIONS)
    assert "torchao" not in sys.modules


def test_float16_is_not_rounded_stochastically(monkeypatch):
    monkeypatch.setattr(adamw, "find_spec", lambda name: object())
    with pytest.raises(ValueError, match="is for bfloat16, and the trained weights are in float16"):
        make_adamw(weights(torch.bfloat16, torch.float16), "stochastic_rounding", **OPTIONS)
