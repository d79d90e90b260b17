"""The same posterior and the same metrics on one process and on several; real processes, over gloo."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
from distributed_runs import CALIBRATION, METHODS, TEST, TRAIN
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader, DistributedSampler
from toy import ToyData, ToyModule, loader, trainer

import bmoe_lightning
from bmoe_lightning.callback import BayesianMoECallback
from bmoe_lightning.curvature import collect_factors
from bmoe_lightning.curvature.spec import Curvature
from bmoe_lightning.laplace import LaplacePosterior
from bmoe_lightning.methods import fit_methods, get_method


def run_script(folder, kind, *world_sizes, script="distributed_runs.py", **variables):
    """Run a script of this folder in a fresh process."""
    paths = [str(Path(bmoe_lightning.__file__).parents[1]), str(Path(__file__).parent)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", **variables}
    command = [sys.executable, str(Path(__file__).with_name(script)), str(folder), kind]
    done = subprocess.run(
        [*command, *map(str, world_sizes)], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return folder


def read(folder, stage, world_size, rank):
    """What one process wrote down: JSON, and tensors if there are any."""
    path = folder / f"{stage}-{world_size}-{rank}"
    tensors = path.with_suffix(".safetensors")
    return json.loads(path.with_suffix(".json").read_text()), load_file(tensors) if tensors.exists() else {}


def dense(tensors, layer, kind):
    """The full factor: eigenvectors may differ in sign."""
    basis, eigenvalues = tensors[f"{layer}.{kind}_basis"], tensors[f"{layer}.{kind}_eigenvalues"]
    return basis @ torch.diag_embed(eigenvalues) @ basis.mT


def assert_same_factors(found, expected):
    for layer in range(2):
        assert torch.equal(found[f"{layer}.slots"], expected[f"{layer}.slots"])
        for kind in ("a", "g"):
            one, other = dense(found, layer, kind), dense(expected, layer, kind)
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12 * float(other.abs().max()))
            name = f"{layer}.{kind}_trace"
            torch.testing.assert_close(found[name], expected[name], rtol=1e-10, atol=0)
    torch.testing.assert_close(found["prior_precision"], expected["prior_precision"], rtol=1e-6, atol=0)


def assert_same_scalars(all_found, all_expected):
    """`kappa` to a factor: each rank has its own random contrasts, and where weights are sharded it is unknown."""
    found, expected = ({key: x for key, x in y.items() if "/kappa" not in key} for y in (all_found, all_expected))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-6), name
    for name in (all_found.keys() - found.keys()) & all_expected.keys():
        assert 0.4 < all_found[name] / all_expected[name] < 2.5, name


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """With one process and with two."""
    return run_script(tmp_path_factory.mktemp("two"), "whole", 1, 2)


@pytest.fixture(scope="module")
def runs_of_three(tmp_path_factory):
    return run_script(tmp_path_factory.mktemp("three"), "whole", 1, 3)


@pytest.fixture(scope="module")
def small_runs(tmp_path_factory):
    return run_script(tmp_path_factory.mktemp("small"), "small", 1, 2, 3)


@pytest.fixture(scope="module")
def launched_runs(tmp_path_factory):
    return run_script(tmp_path_factory.mktemp("launched"), "launched", 2)


class SameAsOneProcess:
    """Run for two processes and, slower, for three."""

    world_size: int

    def test_every_process_has_the_posterior_of_one(self, folder):
        content, tensors = read(folder, "fit", 1, 0)
        assert min(content["scalars"].values()) >= 0
        for rank in range(self.world_size):
            found, found_tensors = read(folder, "fit", self.world_size, rank)
            assert_same_factors(found_tensors, tensors)
            assert_same_scalars(found["scalars"], content["scalars"])

    def test_all_processes_have_the_same_bits(self, folder):
        first, tensors = read(folder, "fit", self.world_size, 0)
        for rank in range(1, self.world_size):
            content, found = read(folder, "fit", self.world_size, rank)
            assert content["scalars"] == first["scalars"]
            assert content["states"] == first["states"]
            assert all(torch.equal(found[name], value) for name, value in tensors.items())

    def test_predictions_of_every_method(self, folder):
        _, expected = read(folder, "test", 1, 0)
        assert set(expected) == {*METHODS, "labels"}
        assert torch.equal(expected["labels"], ToyData(TEST, 3).labels)
        for rank in range(self.world_size):
            _, found = read(folder, "test", self.world_size, rank)
            assert torch.equal(found.pop("labels"), expected["labels"])
            for name, log_probs in found.items():
                torch.testing.assert_close(log_probs, expected[name], rtol=1e-6, atol=1e-6)

    def test_metrics_of_every_method(self, folder):
        expected = read(folder, "test", 1, 0)[0]["metrics"]
        assert {f"{m}/test/{k}" for m in METHODS for k in ("acc", "ece", "nll", "brier")} == set(expected)
        for rank in range(self.world_size):
            found = read(folder, "test", self.world_size, rank)[0]["metrics"]
            assert found == pytest.approx(expected, rel=1e-6, abs=1e-7)

    def test_the_first_process_alone_writes(self, folder):
        for stage, expected in (("fit", ["save_snapshot", "save_snapshot", "save_fit"]), ("test", None)):
            assert read(folder, stage, self.world_size, 0)[0]["wrote"] == (expected or ["report"])
            for rank in range(1, self.world_size):
                assert read(folder, stage, self.world_size, rank)[0]["wrote"] == []
        written = sorted(path.name for path in (folder / f"written-{self.world_size}").rglob("*") if path.is_file())
        fit_id = read(folder, "fit", self.world_size, 0)[0]["id"]
        snapshots = [name for name in written if "-epoch-" in name]
        assert [name[:19] for name in snapshots] == [f"{fit_id[:8]}-epoch-000{epoch}" for epoch in (0, 1)]
        (methods,) = (name for name in written if name.startswith("methods-"))
        assert written == sorted([*snapshots, "index.json", methods, "posterior.safetensors"])

    def test_every_process_sees_what_was_written(self, folder):
        for rank in range(self.world_size):
            content, _ = read(folder, "fit", self.world_size, rank)
            assert content["sees"]
            assert content["id"] == read(folder, "fit", self.world_size, 0)[0]["id"]

    def test_tensorboard_holds_the_whole_data_set_s_metrics(self, folder):
        events = EventAccumulator(str(folder / f"logs-{self.world_size}" / "run" / "methods" / "laplace_lpo"))
        events.Reload()
        expected = read(folder, "test", 1, 0)[0]["metrics"]["laplace_lpo/test/nll"]
        assert events.Scalars("test/nll")[0].value == pytest.approx(expected, rel=1e-6)

    def test_prediction_is_split_as_lightning_does(self, folder):
        found = {}
        for rank in range(self.world_size):
            for path in folder.glob(f"predict*-{self.world_size}-{rank}.safetensors"):
                content = load_file(path)
                for ids, probs in zip(content["ids"], content["probs"], strict=True):
                    assert tuple(ids.tolist()) not in found
                    found[tuple(ids.tolist())] = probs
        probs = torch.stack([found[tuple(ids.tolist())] for ids in ToyData(TEST, 3).ids])
        torch.testing.assert_close(probs, read(folder, "test", 1, 0)[1]["laplace_lpo"].exp(), rtol=1e-6, atol=1e-6)


class WritesPredictions:
    """The file of a run that has one."""

    world_size: int

    def test_the_file_of_predictions_has_each_row_once_in_order(self, folder):
        found, expected = (
            [json.loads(line) for line in (folder / f"rows-{size}.jsonl").read_text().splitlines()]
            for size in (self.world_size, 1)
        )
        assert [row["id"] for row in found] == [row["id"] for row in expected] == list(map(str, range(TEST)))
        for row, other in zip(found, expected, strict=True):
            assert row["answer"] == other["answer"]
            assert row["probabilities"] == pytest.approx(other["probabilities"], rel=1e-6, abs=1e-6)


class TestTwoProcesses(WritesPredictions, SameAsOneProcess):
    world_size = 2

    @pytest.fixture
    def folder(self, runs):
        return runs

    def test_counting_repeated_examples_would_have_changed_everything(self, runs):
        # What the distributed samplers would have given to both processes, repeated examples included.
        data = ToyData(TRAIN, 1)
        padded = [i for rank in (0, 1, 2) for i in DistributedSampler(data, 3, rank, shuffle=False)]
        assert len(padded) == TRAIN + 1
        assert all(count % size for count in (CALIBRATION, TEST) for size in (2, 3))
        module = ToyModule()
        module.load_state_dict(load_file(runs / "trained.safetensors"))

        def slots(indices):
            batch = {"input_ids": data.ids[indices], "labels": data.labels[indices]}
            factors = collect_factors(module, lambda m, b: m.class_logits(b), [batch])
            return sum(float(layer.slots.sum()) for layer in factors.layers)

        counted = sum(float(read(runs, "fit", 2, 0)[1][f"{layer}.slots"].sum()) for layer in (0, 1))
        assert counted == slots(list(range(TRAIN)))
        assert counted < slots(padded)
        # The last example of an odd test set comes with the first one once more.
        log_probs, labels = (read(runs, "test", 2, 0)[1][name] for name in ("map", "labels"))
        nll = -log_probs.gather(1, labels.unsqueeze(1)).squeeze(1)
        logged = read(runs, "test", 2, 0)[0]["metrics"]["map/test/nll"]
        assert logged == pytest.approx(float(nll.mean()), rel=1e-6)
        assert logged != pytest.approx(float(torch.cat([nll, nll[:1]]).mean()), rel=1e-4)


@pytest.mark.slow
class TestThreeProcesses(WritesPredictions, SameAsOneProcess):
    world_size = 3

    @pytest.fixture
    def folder(self, runs_of_three):
        return runs_of_three


@pytest.mark.slow
class TestSmall:
    @pytest.mark.parametrize("world_size", [2, 3])
    @pytest.mark.parametrize("name", ["tiny", "weighted", "reduced", "unlabelled", "plain"])
    def test_gives_what_one_process_gives(self, small_runs, name, world_size):
        expected, tensors = read(small_runs / name, "fit", 1, 0)
        for rank in range(world_size):
            found, found_tensors = read(small_runs / name, "fit", world_size, rank)
            assert_same_scalars(found["scalars"], expected["scalars"])
            if tensors:
                assert_same_factors(found_tensors, tensors)

    @pytest.mark.parametrize("world_size", [2, 3])
    def test_a_cap_is_of_each_process_and_scales_by_all(self, small_runs, world_size):
        for rank in range(world_size):
            path = small_runs / "capped" / f"fit-{world_size}-{rank}.safetensors"
            factors = LaplacePosterior.load(path).factors
            assert (factors.num_examples_used, factors.num_examples) == (2 * 4 * world_size, TRAIN)

    @pytest.mark.parametrize(("world_size", "used"), [(1, 45), (2, 49), (3, 45)])
    def test_dropped_batches_are_those_of_training(self, small_runs, world_size, used):
        path = small_runs / "drop" / f"fit-{world_size}-0.safetensors"
        assert LaplacePosterior.load(path).factors.num_examples_used == used

    @pytest.mark.parametrize("world_size", [2, 3])
    def test_fit_methods_by_all_processes_and_by_one(self, small_runs, world_size):
        expected, tensors = read(small_runs, "direct", 1, 0)
        for rank in range(world_size):
            content, found = read(small_runs, "direct", world_size, rank)
            assert_same_factors(found, tensors)
            assert_same_scalars(content["scalars"], expected["scalars"])
        assert content["alone"] == TRAIN // world_size  # without the others: on its own share alone

    def test_drawn_labels_differ_between_processes(self, small_runs):
        # Equal in distribution: the a-factors and counts do not depend on labels, the g-factors vary by their draw.
        _, one = read(small_runs / "mc", "fit", 1, 0)
        _, two = read(small_runs / "mc", "fit", 2, 0)
        for layer in (0, 1):
            assert torch.equal(one[f"{layer}.slots"], two[f"{layer}.slots"])
            torch.testing.assert_close(one[f"{layer}.a_trace"], two[f"{layer}.a_trace"])
            assert not torch.allclose(one[f"{layer}.g_trace"], two[f"{layer}.g_trace"])
            mean, other = (float(x[f"{layer}.g_trace"].sum()) for x in (one, two))
            assert mean == pytest.approx(other, rel=0.5)


class TestLaunchedByLightning:
    @pytest.fixture
    def folder(self, launched_runs):
        return launched_runs

    def test_processes_agree_after_training_from_different_weights(self, folder):
        first, tensors = read(folder, "fit", 2, 0)
        second, found = read(folder, "fit", 2, 1)
        assert first["scalars"] == second["scalars"]
        assert all(torch.equal(found[name], value) for name, value in tensors.items())
        assert first["folder"] == second["folder"]
        metrics = [read(folder, "test", 2, rank)[0]["metrics"] for rank in (0, 1)]
        # The module's own loss is of each process's share: it is logged without sync_dist.
        assert metrics[0].pop("test_loss") != metrics[1].pop("test_loss")
        assert metrics[0] == metrics[1]

    def test_fit_posterior_finds_where_differing_modules_start(self, folder):
        expected, tensors = read(folder, "fit", 2, 0)
        for rank in (0, 1):
            found, found_tensors = read(folder, "again", 2, rank)
            assert found["id"] == expected["id"]  # that of the run, to which a snapshot would belong
            assert found["folder"] != expected["folder"]
            assert_same_scalars(found["scalars"], expected["scalars"])
            assert_same_factors(found_tensors, tensors)

    def test_one_process_goes_on_with_what_two_have_written(self, folder, tmp_path):
        callback = BayesianMoECallback(methods=("map", "laplace_evidence", "laplace_lpo"))
        metrics = trainer(tmp_path, [callback]).test(
            ToyModule(seed=5),
            loader(TEST, 3),
            ckpt_path=str(folder / "last.ckpt"),
            weights_only=True,
            verbose=False,
        )[0]
        logged = read(folder, "test", 2, 0)[0]["metrics"]
        for method in callback.methods:
            name = f"{method.name}/test/nll"
            assert metrics[name] == pytest.approx(logged[name], rel=1e-4)

    def test_several_and_shuffled_loaders(self, folder):
        found = [json.loads((folder / f"validate-{rank}.json").read_text()) for rank in (0, 1)]
        assert found[0] == found[1]
        logged = read(folder, "test", 2, 0)[0]["metrics"]
        assert found[0]["laplace_lpo/val_0/nll"] == pytest.approx(logged["laplace_lpo/test/nll"], rel=1e-6)
        assert found[0]["map/val_1/nll"] != pytest.approx(found[0]["map/val_0/nll"], rel=1e-3)


def test_a_sketch_that_does_not_add_up():
    with pytest.raises(ValueError, match="rsvd"):
        collect_factors(ToyModule(), lambda m, b: m.class_logits(b), loader(4, 1), sketch="rsvd", distributed=True)


def class_logits(module, batch):
    return module.class_logits(batch)


CHOSEN = [get_method(name).with_defaults(Curvature()) for name in ("map", "laplace_lpo")]


def fitted(*, distributed=False, training=None):
    training = loader(30, 1) if training is None else training
    module = ToyModule()
    return module, fit_methods(CHOSEN, module, class_logits, training, loader(20, 2), distributed=distributed)


class TestFitMethods:
    def test_distributed_with_one_process_changes_nothing(self):
        assert fitted()[1].scalars(CHOSEN) == fitted(distributed=True)[1].scalars(CHOSEN)

    def test_no_data_at_all_is_refused(self):
        with pytest.raises(ValueError, match="no batch"):
            fitted(training=[], distributed=True)


def test_a_fit_in_use_can_be_sent_to_another_process():
    module, fit = fitted()
    batch = next(iter(loader(5, 3)))
    used = [fit.posteriors[Curvature().digest], fit.served_posterior(Curvature().digest)]
    expected = [posterior.predict(module, class_logits, batch) for posterior in used]
    sent = pickle.loads(pickle.dumps((fit, used[1])))
    found = [sent[0].posteriors[Curvature().digest], sent[1]]
    for posterior, log_probs in zip(found, expected, strict=True):
        torch.testing.assert_close(posterior.predict(module, class_logits, batch), log_probs)


def test_a_trainer_of_one_process_knows_nothing_of_others(tmp_path):
    """Also where the user's data are dealt out: then each process has a trainer of its own."""
    sampler = DistributedSampler(ToyData(31, 1), 2, 0)
    callback = BayesianMoECallback(methods=("map", "laplace_evidence"))
    L.seed_everything(0, verbose=False)
    trainer(tmp_path, [callback], max_epochs=1).fit(ToyModule(), DataLoader(ToyData(31, 1), 8, sampler=sampler))
    (posterior,) = callback.fitted.posteriors.values()
    assert posterior.factors.num_examples_used == 16


@pytest.mark.slow
def test_processes_pad_on_the_side_that_they_measure_together(tmp_path):
    run_script(tmp_path, "padding", 2, script="padded_runs.py")
    first, second = (json.loads((tmp_path / f"padding-{rank}.json").read_text()) for rank in range(2))
    assert first == second
    assert first == {
        "replicated deepseek_v4": ["right", False],
        "replicated mixtral": ["left", False],
        "sharded deepseek_v4": ["right", True],
        "sharded mixtral": ["left", True],
    }
