"""Weights that FSDP2 shards: the same posterior and the same metrics as with whole ones; real processes, over gloo."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from distributed_runs import TEST, plain_logits
from safetensors.torch import load_file
from test_distributed import SameAsOneProcess, assert_same_scalars, read, run_script
from toy import ToyData, ToyModule

from bmoe_lightning.curvature import collect_factors
from bmoe_lightning.experts.counted_batch import CountedBatch, count_of, plain_batch
from bmoe_lightning.laplace import LaplacePosterior

SCRIPT = "sharded_runs.py"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """With one process and whole weights, then with two that share them."""
    folder = run_script(tmp_path_factory.mktemp("sharded"), "whole", 1)
    return run_script(folder, "whole", 2, script=SCRIPT)


class TestEndToEnd(SameAsOneProcess):
    world_size = 2

    @pytest.fixture
    def folder(self, runs):
        return runs

    def test_prediction_is_split_as_lightning_does(self, folder):
        found = {}
        for path in sorted(folder.glob("predict*-2-*.safetensors")):
            content = load_file(path)
            found |= dict(zip(map(tuple, content["ids"].tolist()), content["probs"], strict=True))
        ids = ToyData(TEST, 3).ids[: TEST - TEST % 6]
        probs = torch.stack([found[tuple(row)] for row in ids.tolist()])
        expected = read(folder, "test", 1, 0)[1]["laplace_lpo"].exp()[: len(ids)]
        torch.testing.assert_close(probs, expected, rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize(
        ("name", "said"),
        [
            ("predict", "they have 24, 23"),
            ("best", "fit_at='best'"),
            ("tensor", r"tensor-parallel group of 2 processes.*data_parallel_size=2, tensor_parallel_size=1"),
        ],
    )
    def test_what_cannot_work_is_refused_on_all_processes(self, folder, name, said):
        for rank in range(2):
            message = json.loads((folder / f"refusals-{rank}.json").read_text())[name]
            with pytest.raises(ValueError, match=said):
                raise ValueError(message)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_whatever_looks_at_weights_sees_the_same_in_parts(tmp_path, world_size):
    """Factors, distances, fingerprint, predictions, borrowed weights; fused experts and separate ones."""

    def process(rank):
        return run_script(tmp_path, "parts", world_size, script=SCRIPT, RANK=str(rank))

    with ThreadPoolExecutor(world_size) as pool:
        assert len(list(pool.map(process, range(world_size)))) == world_size
    for rank in range(world_size):
        found = json.loads((tmp_path / f"parts-{world_size}-{rank}.json").read_text())
        refused = found.pop("refused")
        assert refused["absent"] < 1e-12
        assert refused["afterwards"] < 1e-12
        said = refused["said"]
        assert said.pop("inside") == "stopped inside"
        if world_size == 1:  # nobody to be out of step with
            assert said == {}
        else:
            assert f"1 of {world_size} processes have a batch left" in said["uneven"]
            assert said["uneven calibration"] == said["uneven"]
            assert "with distributed=True" in said["alone"]
            assert f"{world_size - 1} of {world_size} processes differ from the others" in said["copies"]
        snapshots = found.pop("snapshots")
        assert snapshots.pop("uneven") is (world_size == 3)
        assert snapshots == {"inside": 0.0, "afterwards": 0.0, "again": 0.0, "applied": 0.0}
        assert set(found) == {"fused", "modules"}
        for kinds in found.values():
            assert set(kinds) == {"FSDP", "HSDP", "by width", "recomputed"}
            for differences in kinds.values():
                assert len(differences) == 14
                assert max(differences.values()) < 1e-12
                assert differences["fingerprint"] == differences["whole"] == 0


@pytest.mark.slow
def test_a_finetuner_shards_itself_and_its_checkpoints_are_read_back(tmp_path):
    run_script(tmp_path, "finetuner", 2, script="finetuner_runs.py")
    first, second = (json.loads((tmp_path / f"finetuner-{rank}.json").read_text()) for rank in range(2))
    assert first == second
    assert set(first) == {"distributed", "single"}
    for said in first.values():
        assert said["same"]
        assert said["epochs"] == 2
        assert said["refused"]
        assert said["nll"] == said["nll read back"] < said["map"]
        assert said["prior mean"] == said["resumed prior mean"] != said["trained"]
        assert_same_scalars(said["completed fit"], said["fit"])


@pytest.mark.slow
def test_low_rank_updates_are_sharded_too(tmp_path):
    pytest.importorskip("peft")
    run_script(tmp_path, "lora", 2, script="finetuner_runs.py")
    first, second = (json.loads((tmp_path / f"lora-{rank}.json").read_text()) for rank in range(2))
    assert first == second
    for said in first.values():
        assert said["moved"]
        assert said["test"]["bayesian_lora/test/nll"] != said["test"]["map/test/nll"]
        for name, value in said["alone"].items():
            if "kappa" not in name:  # each rank has its own random contrasts
                # In float32; LPO's objective is flat at its minimum, which moves by more than the objective's rounding.
                rel = 5e-3 if "prior_precision" in name else 1e-4
                assert said["fit"][name] == pytest.approx(value, rel=rel), name


@pytest.mark.slow
def test_a_float32_copy_of_shards_resumes_bit_for_bit(tmp_path):
    run_script(tmp_path, "half", 2, script="finetuner_runs.py")
    first, second = (json.loads((tmp_path / f"half-{rank}.json").read_text()) for rank in range(2))
    assert first == second
    for said in first.values():
        assert said["differing"] == []
        assert said["copies"]
        assert said["number"] == 4
        assert min(said["moved"]) > 5e-5  # of six steps of 5e-5


@pytest.mark.slow
def test_a_model_is_whole_in_one_process_at_a_time(tmp_path):
    run_script(tmp_path, "loading", 2, script="finetuner_runs.py")
    (begin, end), (later, _) = sorted(json.loads((tmp_path / f"loading-{rank}.json").read_text()) for rank in range(2))
    assert begin < end <= later


def answers(module, batch):
    return module.class_logits(batch)


def batch_of(*indices):
    data = ToyData(8, 1)
    return {"input_ids": data.ids[list(indices)], "labels": data.labels[list(indices)]}


class TestCountedBatches:
    """Examples that run and do not count."""

    @pytest.mark.parametrize("fisher", ["exact", "empirical"])
    @pytest.mark.parametrize("approximation", ["expand", "reduce"])
    def test_curvature_is_that_of_the_counted_ones(self, fisher, approximation):
        module = ToyModule()
        options = {"fisher": fisher, "approximation": approximation, "rank": 3}
        expected = collect_factors(module, answers, [batch_of(0, 1, 2), batch_of(3, 4)], **options)
        padded = [batch_of(0, 1, 2), CountedBatch(batch_of(3, 4, 0), 2, 3), CountedBatch(batch_of(5, 6), 0, 2)]
        found = collect_factors(module, answers, padded, **options)
        assert found.num_examples_used == expected.num_examples_used == 5
        for mine, other in zip(found.layers, expected.layers, strict=True):
            assert torch.equal(mine.slots, other.slots)
            torch.testing.assert_close(mine.curvature(), other.curvature(), rtol=1e-4, atol=1e-6)

    def test_calibration_is_that_of_the_counted_ones(self):
        module = ToyModule()
        batches = [batch_of(0, 1, 2), batch_of(3, 4)]
        padded = [batch_of(0, 1, 2), CountedBatch(batch_of(3, 4, 0), 2, 3), CountedBatch(batch_of(5, 6), 0, 2)]
        posterior = LaplacePosterior(collect_factors(module, answers, batches, rank=3))
        expected, found = (posterior.validation_cache(module, answers, x) for x in (batches, padded))
        for name in ("logits", "labels", "embedding", "prior", "binned"):
            torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-4, atol=1e-6)
        for mine, other in zip(*(plain_logits(module, answers, x) for x in (padded, batches)), strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)

    def test_examples_that_are_no_entries_are_refused_where_it_matters(self):
        assert plain_batch(CountedBatch("batch", 2, 3)) == plain_batch("batch") == "batch"
        assert count_of(CountedBatch("batch", 3, 3), 6) == count_of("batch", 6) == 6
        assert count_of(CountedBatch("batch", 1, 3), 3) == 1
        with pytest.raises(ValueError, match="6 examples for 3 entries"):
            count_of(CountedBatch("batch", 2, 3), 6)
