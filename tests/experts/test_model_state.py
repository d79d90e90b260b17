"""Modes of a model, set for a while."""

from __future__ import annotations

from torch import nn

from bmoe_lightning.experts.model_state import evaluation_mode


def test_evaluation_mode_restores_each_module():
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout()))
    model[1].eval()
    with evaluation_mode(model):
        assert not any(m.training for m in model.modules())
    assert [m.training for m in model.modules()] == [True, True, False, False]
