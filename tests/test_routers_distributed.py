"""Bayesian routers that are trained on two processes, with DDP and with weights that FSDP2 shards."""

from __future__ import annotations

import json

import pytest
from test_distributed import run_script


def read(folder, kind, rank):
    return json.loads((folder / f"{kind}-{rank}.json").read_text())


@pytest.mark.slow
def test_gradients_of_a_users_module_are_those_of_one_process(tmp_path):
    folder = run_script(tmp_path, "users", 2, script="router_runs.py")
    for rank in (0, 1):
        for found in read(folder, "users", rank).values():
            assert found["names"]
            assert found["size"] > 1e-3
            assert found["largest"] < 1e-6


@pytest.mark.slow
def test_the_finetuner_trains_the_same_however_its_weights_are_stored(tmp_path):
    folder = run_script(tmp_path, "finetuner", 2, script="router_runs.py")
    one, other = read(folder, "finetuner", 0), read(folder, "finetuner", 1)
    for kind in ("ddp", "sharded"):
        assert one[kind]["sums"] == pytest.approx(other[kind]["sums"], rel=1e-6)
        assert one[kind]["scales"] == other[kind]["scales"]
        for name in ("kl", "val", "test"):
            assert one[kind][name] == pytest.approx(other[kind][name], rel=1e-6)
    assert one["ddp"]["loaded"]
    for name in ("scales", "sums", "kl", "val", "test"):
        assert one["sharded"][name] == pytest.approx(one["ddp"][name], rel=1e-4, abs=1e-4), name
