"""A trainer that is only looked at: the attributes that the library reads, without a run.

`tests/test_fake_trainer.py` holds it to a real `Trainer`, so that no attribute exists here alone.
"""

from __future__ import annotations

import types
from typing import Any

DEFAULTS: dict[str, Any] = {
    "callbacks": [],
    "checkpoint_callback": None,
    "ckpt_path": None,
    "current_epoch": 0,
    "datamodule": None,
    "default_root_dir": "",
    "enable_validation": False,
    "fast_dev_run": False,
    "global_rank": 0,
    "is_global_zero": True,
    "loggers": [],
    "max_epochs": 3,
    "num_devices": 1,
    "num_training_batches": 0,
    "num_val_batches": [],
    "optimizers": [],
    "progress_bar_callback": None,
    "received_sigterm": False,
    "strategy": None,
    "train_dataloader": None,
    "val_dataloaders": None,
    "world_size": 1,
}


class FakeTrainer(types.SimpleNamespace):
    """A trainer with the given attributes; those that are left out are of one process that has no data.

    Args:
        restoring: Whether it is restoring a checkpoint.
        attributes: Attributes of a trainer; others than those of `DEFAULTS` are refused.
    """

    def __init__(self, *, restoring: bool = False, **attributes: Any) -> None:
        unknown = sorted(set(attributes) - set(DEFAULTS))
        if unknown:
            raise TypeError(f"not in the list that is checked against a real Trainer: {unknown}")
        super().__init__(**{**DEFAULTS, **attributes})
        self._checkpoint_connector = types.SimpleNamespace(_loaded_checkpoint={"state_dict": {}} if restoring else {})


class FakeMesh(dict):
    """A device mesh of `ModelParallelStrategy`, of whose dimensions the sizes alone are known."""

    def __init__(self, data_parallel: int = 1, tensor_parallel: int = 1) -> None:
        sizes = {"data_parallel": data_parallel, "tensor_parallel": tensor_parallel}
        self._size = data_parallel * tensor_parallel
        super().__init__({name: types.SimpleNamespace(size=lambda n=n: n) for name, n in sizes.items()})

    def size(self) -> int:
        return self._size


def strategy_of(kind: type, **attributes: Any) -> Any:
    """A strategy of a class whose constructor needs what is not installed here."""
    strategy = kind.__new__(kind)
    vars(strategy).update(attributes)
    return strategy
