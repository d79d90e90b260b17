"""The plan against the resident memory of a process, which counts mapped pages too."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from oracles.planned import built

from recipes.plan import memory
from recipes.plan.architecture import describe

ROOT = Path(__file__).parents[3]
_SCRIPT = """
import re, sys
import torch
from bmoe_lightning.models.loading import load_causal_model

def resident():
    return 1024 * int(re.search(r"VmRSS:\\s+(\\d+)", open("/proc/self/status").read())[1])

def read(model):
    return sum(float(p.detach().flatten()[::512].sum()) for p in model.parameters())  # touches each page

read(load_causal_model(sys.argv[1]))  # what loading imports is not counted
before = resident()
model = load_causal_model(sys.argv[2])
read(model)
print(resident() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="the system does not tell resident memory")
def test_a_loaded_model_and_the_mapped_pages_of_its_files(tmp_path):
    """To 20 %: the allocator keeps some of what stacking takes. Without mapped pages the plan is too low by more."""
    built(torch.float32).save_pretrained(tmp_path / "small")
    large = built(torch.float32, hidden_size=256, vocab_size=8192, moe_intermediate_size=1024, num_experts=8)
    large.save_pretrained(tmp_path / "large")
    planned = describe(large)
    mapped = memory.mapped_bytes(planned)
    assert mapped == sum(p.nbytes for name, p in large.named_parameters() if ".experts." in name)
    assert mapped > 0.5 * planned.weight_bytes
    del large
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT, str(tmp_path / "small"), str(tmp_path / "large")],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout) == pytest.approx(planned.weight_bytes + mapped, rel=0.2)
