"""A small mixture of experts in a LightningModule of a user's own, with a task it can learn."""

from __future__ import annotations

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

NUM_CLASSES = 3
ANSWER_TOKENS = (1, 2, 3)
LAPLACE = ("map", "laplace_evidence", "laplace_lpo")


def toy_model(seed: int = 0) -> Qwen2MoeForCausalLM:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Qwen2MoeForCausalLM(
            Qwen2MoeConfig(
                vocab_size=24,
                hidden_size=16,
                intermediate_size=16,
                moe_intermediate_size=8,
                shared_expert_intermediate_size=8,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=2,
                num_experts=4,
                num_experts_per_tok=2,
                max_position_embeddings=32,
                tie_word_embeddings=False,
                initializer_range=0.3,
            )
        )


class ToyData(Dataset):
    """Sequences whose class is the remainder of their first token's number, with some labels wrong."""

    def __init__(self, size: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.ids = torch.randint(4, 24, (size, 6), generator=generator)
        noise = torch.rand(size, generator=generator) < 0.2
        wrong = torch.randint(0, NUM_CLASSES, (size,), generator=generator)
        self.labels = torch.where(noise, wrong, self.ids[:, 0] % NUM_CLASSES)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[index], "labels": self.labels[index]}


def loader(size: int, seed: int, *, shuffle: bool = False, batch_size: int = 16) -> DataLoader:
    return DataLoader(ToyData(size, seed), batch_size=batch_size, shuffle=shuffle)


class ToyModule(L.LightningModule):
    """Trains every parameter with an optimiser of its own; knows nothing of the callback but `class_logits`."""

    def __init__(self, seed: int = 0, learning_rate: float = 1e-2) -> None:
        super().__init__()
        self.network = toy_model(seed)
        self.learning_rate = learning_rate

    def class_logits(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        logits = self.network(input_ids=batch["input_ids"], use_cache=False).logits[:, -1, list(ANSWER_TOKENS)]
        return logits, batch.get("labels")

    def training_step(self, batch, batch_idx):
        logits, labels = self.class_logits(batch)
        return torch.nn.functional.cross_entropy(logits, labels)

    def validation_step(self, batch, batch_idx):
        logits, labels = self.class_logits(batch)
        self.log("val_loss", torch.nn.functional.cross_entropy(logits, labels))

    def test_step(self, batch, batch_idx):
        logits, labels = self.class_logits(batch)
        self.log("test_loss", torch.nn.functional.cross_entropy(logits, labels))

    def predict_step(self, batch, batch_idx):
        return self.class_logits(batch)[0]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.learning_rate, momentum=0.9)


def trainer(folder, callbacks, **options) -> L.Trainer:
    defaults = {
        "max_epochs": 3,
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "default_root_dir": str(folder),
    }
    return L.Trainer(**{**defaults, **options}, callbacks=callbacks)


def train_loader(**options):
    return loader(160, 1, shuffle=True, **options)


def calibration_loader():
    return loader(112, 2)


def test_loader():
    return loader(48, 3)


test_loader.__test__ = False  # a loader, not a test


def fit_posterior(callback, run, module, data=None, **options):
    """Fit the methods of a callback to a model that is trained, with the data of the tests."""
    loaders = {"train_dataloaders": data or train_loader(), "val_dataloaders": calibration_loader()}
    callback.fit_posterior(module, trainer=run, **loaders, **options)
