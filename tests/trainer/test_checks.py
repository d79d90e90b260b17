"""What is refused before time is spent, on trainers that are only looked at."""

from __future__ import annotations

from contextlib import nullcontext

import lightning as L
import pytest
import torch
from fake_trainer import FakeMesh, FakeTrainer, strategy_of
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from lightning.pytorch.callbacks import EarlyStopping, ModelPruning, StochasticWeightAveraging
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    XLAStrategy,
)
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, SubsetRandomSampler
from toy import ToyModule

from bmoe_lightning.curvature import Curvature
from bmoe_lightning.methods import LeaveOneOutTemperature
from bmoe_lightning.trainer.checks import (
    check_fit_at,
    check_later_callbacks,
    check_loaders,
    check_prediction,
    check_runs,
    check_shards,
    check_sketch,
    check_strategy,
    check_tensor_parallel,
    is_trial,
)


def test_methods_are_checked_with_the_weights_that_the_optimizers_have():
    """The same weights as the fit counts as trained."""
    module, method = ToyModule(), LeaveOneOutTemperature().with_defaults(Curvature())
    others = [p for name, p in module.named_parameters() if "experts" not in name]
    for optimizers, refused in (
        ([torch.optim.SGD(others)], True),
        ([torch.optim.SGD(module.parameters())], False),
        ([], False),
    ):
        run = FakeTrainer(optimizers=optimizers, world_size=1, num_devices=1)
        with pytest.raises(ValueError, match="covers none of them") if refused else nullcontext():
            check_runs(run, [method], module, None)


def mesh_strategy(world_size, tensor_parallel):
    return strategy_of(ModelParallelStrategy, _device_mesh=FakeMesh(world_size // tensor_parallel, tensor_parallel))


class TestStrategies:
    @pytest.mark.parametrize(
        ("strategy", "world_size", "message"),
        [
            (strategy_of(SingleDeviceStrategy), 1, None),
            (strategy_of(DDPStrategy), 2, None),
            (strategy_of(XLAStrategy), 1, None),
            (mesh_strategy(4, 1), 4, None),
            (strategy_of(FSDPStrategy), 1, "does not support FSDPStrategy"),
            (strategy_of(FSDPStrategy), 2, "does not support FSDPStrategy"),
            (strategy_of(DeepSpeedStrategy), 1, "does not support DeepSpeedStrategy"),
            (strategy_of(DeepSpeedStrategy), 2, "does not support DeepSpeedStrategy"),
            (strategy_of(XLAStrategy), 2, "2 with XLAStrategy"),
            (object(), 2, r"with DDP and with ModelParallelStrategy.* 2 with object"),
            (mesh_strategy(4, 2), 4, r"group of 2 .*data_parallel_size=4, tensor_parallel_size=1"),
        ],
    )
    def test_table(self, strategy, world_size, message):
        run = FakeTrainer(strategy=strategy, world_size=world_size)
        if message is None:
            check_strategy(run)
            return
        with pytest.raises(ValueError, match=message):
            check_strategy(run)

    def test_tensor_parallel_mesh(self):
        check_tensor_parallel(FakeMesh(4, 1))
        with pytest.raises(ValueError, match=r"group of 4 .*data_parallel_size=4.*fully_shard in configure_model"):
            check_tensor_parallel(FakeMesh(1, 4))


class TestShards:
    def test_unsharded_trained_parameters(self):
        run = FakeTrainer(strategy=ModelParallelStrategy(), world_size=2)
        with pytest.raises(ValueError, match=r"'network.model.embed_tokens.weight' for one.*fully_shard"):
            check_shards(run, ToyModule())

    def test_frozen_parameters_and_other_trainers(self):
        module = ToyModule()
        check_shards(FakeTrainer(strategy=ModelParallelStrategy()), module)
        check_shards(FakeTrainer(strategy=DDPStrategy(), world_size=2), module)
        check_shards(FakeTrainer(strategy=ModelParallelStrategy(), world_size=2), module.requires_grad_(False))


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(5))


class TestLoaders:
    def test_prediction_in_lockstep_needs_a_length(self):
        run = FakeTrainer(strategy=ModelParallelStrategy())
        check_prediction(run, [DataLoader(range(5))])
        with pytest.raises(ValueError, match=r"lockstep.*they have unknown"):
            check_prediction(run, [DataLoader(range(5)), DataLoader(Stream())])
        check_prediction(FakeTrainer(strategy=DDPStrategy(), world_size=2), [DataLoader(Stream())])

    def test_samplers_that_overlap(self):
        run = FakeTrainer(world_size=2)
        check_loaders(run, [DataLoader(range(5), sampler=DistributedSampler(range(5), 2, 0))])
        sampler = DistributedSamplerWrapper(SubsetRandomSampler(range(5)), num_replicas=2, rank=0, shuffle=False)
        with pytest.raises(ValueError, match="SubsetRandomSampler samples another order"):
            check_loaders(run, [DataLoader(range(5), sampler=sampler)])

    def test_sketches(self):
        several = FakeTrainer(world_size=2)
        check_sketch(several, [])
        check_sketch(several, ["auto", "nystrom", "exact"])
        with pytest.raises(ValueError, match="rsvd"):
            check_sketch(several, ["nystrom", "rsvd"])
        check_sketch(FakeTrainer(), ["rsvd"])


class TestLaterCallbacks:
    @pytest.mark.parametrize("kind", [StochasticWeightAveraging, ModelPruning])
    def test_that_change_weights(self, kind):
        with pytest.raises(ValueError, match=f"{kind.__name__} changes the weights"):
            check_later_callbacks([L.Callback(), kind.__new__(kind)])
        check_later_callbacks([L.Callback(), EarlyStopping("loss")])

    def test_subclasses_of_weight_averaging(self):
        averaging = pytest.importorskip("lightning.pytorch.callbacks.weight_averaging")
        kind = type("Mine", (averaging.WeightAveraging,), {})
        with pytest.raises(ValueError, match="Mine changes the weights"):
            check_later_callbacks([kind.__new__(kind)])


@pytest.mark.parametrize(
    ("fit_at", "strategy", "refused"),
    [
        ("last", ModelParallelStrategy(), False),
        ("best", DDPStrategy(), False),
        ("best", ModelParallelStrategy(), True),
    ],
)
def test_weights_to_fit_at(fit_at, strategy, refused):
    run = FakeTrainer(strategy=strategy)
    if not refused:
        check_fit_at(run, fit_at)
        return
    with pytest.raises(ValueError, match=r"fit_at='best' reads a checkpoint of unsharded weights.*use fit_at='last'"):
        check_fit_at(run, fit_at)


def test_trial():
    assert is_trial(FakeTrainer(fast_dev_run=True))
    assert not is_trial(FakeTrainer())
