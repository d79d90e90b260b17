"""Curvature passes that are killed on several processes and resume; real processes, over gloo."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from test_distributed import dense, read, run_script


@pytest.fixture(scope="module")
def resumed_runs(tmp_path_factory):
    return run_script(tmp_path_factory.mktemp("resumed"), "resumed", 2, 3, script="resumed_runs.py")


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 3])
class TestCurvatureThatWasKilled:
    """Batches of two examples, of which the first process has one more than the last."""

    @pytest.fixture
    def said(self, resumed_runs, world_size):
        """What each process said, and how many batches it has."""
        return [read(resumed_runs, "resumed", world_size, rank)[0] for rank in range(world_size)]

    def tensors(self, folder, name, world_size, rank):
        return load_file(folder / f"{name}-{world_size}-{rank}.safetensors")

    def names(self, world_size):
        return [f"sums-{world_size}-rank{rank}of{world_size}.safetensors" for rank in range(world_size)]

    @pytest.mark.parametrize("fisher", ["exact", "mc"])
    @pytest.mark.parametrize("name", ["resumed", "finished"])
    def test_goes_on_to_the_same_factors(self, resumed_runs, said, world_size, fisher, name):
        assert said[0]["batches"] == said[-1]["batches"] + 1
        for rank in range(world_size):
            own = said[rank]["said"]
            assert own[f"{fisher}-killed"]["error"] == ""
            assert own[f"{fisher}-killed"]["files"] == self.names(world_size)
            assert own[f"{fisher}-{name}"]["warned"] == []
            assert own[f"{fisher}-{name}"]["calls"] == (said[rank]["batches"] - 2 if name == "resumed" else 0)
            found = self.tensors(resumed_runs, f"{fisher}-{name}", world_size, rank)
            expected = self.tensors(resumed_runs, f"{fisher}-whole", world_size, rank)
            for layer in range(2):
                assert torch.equal(found[f"{layer}.slots"], expected[f"{layer}.slots"])
                for kind in ("a", "g"):
                    one, other = dense(found, layer, kind), dense(expected, layer, kind)
                    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12 * float(other.abs().max()))

    def test_nobody_runs_far_ahead(self, said, world_size):
        """Files that are many writes apart could not be gone on with; so the fast ones wait when they write."""
        fast, slow = (said[rank]["said"]["exact-resumed"]["times"] for rank in (0, 1))
        assert fast[2] >= slow[1] + 0.2  # the first batch after the next write

    def test_goes_on_from_the_newest_write_that_all_have(self, resumed_runs, said, world_size):
        for rank in range(world_size):
            own = said[rank]["said"]["differing-resumed"]
            assert own["warned"] == []
            assert own["calls"] == said[rank]["batches"] - 2
            found = self.tensors(resumed_runs, "differing-resumed", world_size, rank)
            expected = self.tensors(resumed_runs, "exact-whole", world_size, rank)
            assert torch.equal(found["0.slots"], expected["0.slots"])
            torch.testing.assert_close(found["1.g_trace"], expected["1.g_trace"], rtol=1e-12, atol=0)

    def test_begins_anew_where_the_files_of_one_are_missing(self, resumed_runs, said, world_size):
        for rank in range(world_size):
            own = said[rank]["said"]["missing-resumed"]
            writes = [3] * world_size
            writes[1] = 0
            assert len(own["warned"]) == 1
            assert f"no write in common (written {writes} times)" in own["warned"][0]
            assert own["calls"] == said[rank]["batches"]
            found = self.tensors(resumed_runs, "missing-resumed", world_size, rank)
            expected = self.tensors(resumed_runs, "exact-whole", world_size, rank)
            assert torch.equal(found["0.slots"], expected["0.slots"])
            torch.testing.assert_close(found["1.g_trace"], expected["1.g_trace"], rtol=1e-12, atol=0)

    def test_a_damaged_file_stops_all_processes(self, said, world_size):
        for rank in range(world_size):
            own = said[rank]["said"]["damaged"]
            assert "is not a complete curvature checkpoint" in own["error"]
            assert own["error"].startswith("on rank 1: DamagedFileError: ") == (rank != 1)
            assert own["calls"] == 0

    def test_a_process_without_a_batch_keeps_step(self, said, world_size):
        for rank in range(world_size):
            one, again = said[rank]["said"]["removed"], said[rank]["said"]["nothing-again"]
            assert one["error"] is again["error"] is None
            assert one["calls"] == (0 if rank else said[rank]["batches"])
            assert again["calls"] == 0
            assert again["warned"] == []
