"""A plain Lightning script with the callback: one command that resumes from the last checkpoint, if there is one."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from bmoe_lightning import BayesianMoECallback
from bmoe_lightning.curvature import Curvature
from bmoe_lightning.methods import Method
from recipes.benchmark.workload import PRESETS, build

FIT_FOLDER, PREDICTIONS, METRICS, LAST = "fit", "predictions.safetensors", "metrics.json", "last.ckpt"
_SHAPE = PRESETS["tiny"].main
_CLASSES, _EPOCHS = 4, 2
_SIZES = {"train": 32, "validation": 104, "test": 16}


class Sequences(Dataset[dict[str, Tensor]]):
    """Random sequences whose class is the remainder of their first token, a fifth of the labels at random.

    Args:
        part: One of train, validation and test.
    """

    def __init__(self, part: str) -> None:
        size, generator = _SIZES[part], torch.Generator().manual_seed(list(_SIZES).index(part))
        self.ids = torch.randint(_CLASSES, _SHAPE.vocabulary, (size, _SHAPE.tokens), generator=generator)
        noise = torch.rand(size, generator=generator) < 0.2
        drawn = torch.randint(_CLASSES, (size,), generator=generator)
        self.labels = torch.where(noise, drawn, self.ids[:, 0] % _CLASSES)

    def __len__(self) -> int:
        """Number of sequences."""
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Token ids `[T]` and label."""
        return {"ids": self.ids[index], "labels": self.labels[index]}


def loader(part: str, batch_size: int = 8) -> DataLoader[dict[str, Tensor]]:
    """Batches of a part in a fixed order."""
    return DataLoader(Sequences(part), batch_size=batch_size)


class Classifier(L.LightningModule):
    """A tiny mixture of experts; all that the callback knows of it is `class_logits`."""

    def __init__(self) -> None:
        super().__init__()
        self.network = build(_SHAPE, torch.device("cpu")).requires_grad_(True)

    def class_logits(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Logits `[B, K]` and labels `[B]`."""
        return self.network(input_ids=batch["ids"], use_cache=False).logits[:, -1, :_CLASSES], batch["labels"]

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:  # noqa: ARG002
        """Cross entropy of a batch."""
        logits, labels = self.class_logits(batch)
        return nn.functional.cross_entropy(logits, labels)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Nothing: the callback uses the batches."""

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Nothing, likewise."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain SGD with momentum."""
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def run(folder: Path, methods: Sequence[str | Method]) -> int:
    """Train, fit, test and write what was found; returns the exit status.

    Args:
        folder: Folder of checkpoints, fit and predictions.
        methods: Methods of the callback.
    """
    warnings.simplefilter("ignore")
    L.seed_everything(0, verbose=False)
    module = Classifier()
    callback = BayesianMoECallback(
        methods, Curvature(rank=2), dirpath=str(folder / FIT_FOLDER), curvature_checkpoint_every=1
    )
    saves = ModelCheckpoint(folder, save_last=True, enable_version_counter=False)
    trainer = L.Trainer(
        max_epochs=_EPOCHS,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=[callback, saves],
        default_root_dir=str(folder),
    )
    last = folder / LAST
    resumed: dict[str, Any] = {"ckpt_path": str(last), "weights_only": True} if last.is_file() else {}
    trainer.fit(module, loader("train"), loader("validation"), **resumed)
    metrics = trainer.test(module, loader("test"), verbose=False)[0]
    found = callback.predictions["test"]
    save_file({name: each.log_probs.contiguous() for name, each in found.items()}, folder / PREDICTIONS)
    (folder / METRICS).write_text(json.dumps(dict(metrics), sort_keys=True), encoding="utf-8")
    return 0
