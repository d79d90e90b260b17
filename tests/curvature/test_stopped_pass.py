"""A pass of two ranks, of which a signal stops one: the other one stops too, and both resume to the same bits."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import bmoe_lightning

SCRIPT = """
import sys
from pathlib import Path
sys.path[:0] = [sys.argv[2], sys.argv[3]]
import torch, torch.distributed as dist, torch.multiprocessing as mp
import test_checkpoint as t
from bmoe_lightning.curvature import collect_factors

def stopping(batches, after):
    for number, batch in enumerate(batches):
        if number == after:
            raise SystemExit(99)
        yield batch

def collect(folder, batches, every=2):
    return collect_factors(t.wide_model(), t.answer_logits, batches, rank=2, distributed=True,
                           checkpoint=folder / "sums.safetensors", checkpoint_every=every)

def one(rank, folder, ranks):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)
    mine = t.batches()[rank::2] * 2
    expected = collect(folder / "whole", mine)
    for number, after in enumerate(map(int, ranks.split(","))):
        place, every = folder / str(number), 4 if after == 3 else 2
        place.mkdir(exist_ok=True)
        try:
            collect(place, stopping(mine, after) if rank else mine, every)
            raise AssertionError("was not stopped")
        except SystemExit as stop:
            assert stop.code == (99 if rank else 143), stop.code
        files = sorted(path.name for path in place.glob("sums*"))
        assert files, files
        dist.barrier()
        t.assert_same_bits(collect(place, mine), expected)
    dist.destroy_process_group()

if __name__ == "__main__":
    mp.spawn(one, (Path(sys.argv[1]), sys.argv[4]), nprocs=2)
"""


@pytest.mark.slow
def test_all_ranks_stop_and_resume(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path), str(here), str(here.parent), "1,3,5"],
        env={**os.environ, "PYTHONPATH": str(Path(bmoe_lightning.__file__).parents[1]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
