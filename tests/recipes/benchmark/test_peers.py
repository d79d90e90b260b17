"""Peers give the same answer, and one that raises is shown."""

from __future__ import annotations

import sys

import pytest
import torch

from bmoe_lightning import LaplacePosterior
from bmoe_lightning.experts import find_expert_layers
from recipes.benchmark.peers import (
    SAME,
    compared,
    covariance_by_jacobian,
    curvlinops_factors,
    relative_difference,
    separate_experts,
    without_curvature,
)
from recipes.benchmark.workload import PRESETS, Workload

CPU = torch.device("cpu")


@pytest.fixture
def work():
    return Workload(PRESETS["tiny"].peers, CPU)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("preset", ["tiny", "default"])
def test_the_written_out_jacobian_gives_the_same_covariance(preset):
    shape = PRESETS[preset].peers
    work = Workload(shape, CPU)
    posterior = LaplacePosterior(without_curvature(work.collect([work.batch])))
    _, ours = posterior.logit_covariance(work.model, work.class_logits(), work.batch)
    theirs = covariance_by_jacobian(work)
    assert theirs.shape == (shape.examples, 4, 4)
    assert float(theirs.abs().max()) > 0
    assert relative_difference(theirs, ours) < SAME == 1e-4


def test_separate_experts_are_an_equal_model(work):
    with torch.no_grad():
        expected = work.class_logits()(work.model, work.batch)[0]
        separate_experts(work.model)
        found = work.class_logits()(work.model, work.batch)[0]
    torch.testing.assert_close(found, expected)
    layers = find_expert_layers(work.model)
    assert [layer.layout for layer in layers] == ["modules"] * 2


def test_a_peer_that_raises_is_reported_with_our_own_numbers():
    def broken():
        raise KeyError("no | such thing")

    for make in (broken, lambda: broken):
        row = compared("peer", "work", make, lambda: torch.zeros(10), repeats=2, device=CPU)
        assert row.error == "KeyError: 'no | such thing'"
        assert (row.peer_seconds, row.peer_megabytes, row.difference) == ((), None, None)
        assert len(row.our_seconds) == 2
        assert row.our_megabytes > 0


def test_a_peer_that_runs_has_times_memory_and_difference():
    row = compared(
        "peer", "work", lambda: lambda: torch.ones(3) * 1.5, lambda: torch.ones(3) * 2, repeats=3, device=CPU,
        same_answer=True,
    )  # fmt: skip
    assert row.error is None
    assert row.difference == pytest.approx(0.25)
    assert len(row.peer_seconds) == len(row.our_seconds) == 3


def test_a_missing_peer_names_the_extra(work, monkeypatch):
    monkeypatch.setitem(sys.modules, "curvlinops", None)
    with pytest.raises(ImportError, match=r"pip install 'bmoe-lightning\[bench\]'"):
        curvlinops_factors(work)
