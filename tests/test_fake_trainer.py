"""The fake trainer has no attribute that a real one lacks."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from fake_trainer import DEFAULTS, FakeMesh, FakeTrainer
from lightning.pytorch.demos.boring_classes import BoringModel
from torch.distributed.device_mesh import DeviceMesh


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    run = L.Trainer(
        accelerator="cpu",
        max_epochs=3,
        limit_train_batches=2,
        limit_val_batches=0,
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        default_root_dir=str(tmp_path_factory.mktemp("real")),
    )
    run.fit(BoringModel())
    return run


@pytest.mark.parametrize("name", [*DEFAULTS, "_checkpoint_connector"])
def test_a_real_trainer_has_each_attribute(real, name):
    assert hasattr(real, name)
    found, fake = getattr(real, name), getattr(FakeTrainer(), name)
    if isinstance(fake, (bool, int, list)):
        assert type(found) is type(fake)


def test_a_real_trainer_says_where_the_fake_says(real):
    for name in ("checkpoint_callback", "progress_bar_callback", "is_global_zero", "world_size", "global_rank"):
        assert getattr(real, name) == getattr(FakeTrainer(), name)
    assert hasattr(real._checkpoint_connector, "_loaded_checkpoint")


def test_other_attributes_are_refused():
    with pytest.raises(TypeError, match="magic"):
        FakeTrainer(magic=1)


def test_a_real_mesh_is_asked_the_same_way():
    assert {"__getitem__", "size"} <= set(dir(DeviceMesh))
    assert FakeMesh(2, 3)["tensor_parallel"].size() == 3
    assert FakeMesh(2, 3).size() == 6
    assert torch.distributed.is_available()
