"""What the tests of the fine-tuner share: questions, a small model and a trainer."""

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from oracles.models import tiny_qwen

from bmoe_lightning.data import Question
from bmoe_lightning.finetuner import ExpertFinetuner

EXPERTS = {f"model.model.layers.{i}.mlp.experts.{n}" for i in (0, 1) for n in ("gate_up_proj", "down_proj")}
DOWN = {name for name in EXPERTS if name.endswith("down_proj")}


def make(number, part, choices=4):
    return Question(
        f"{part}{number}", f"is {part} number{number} ?", tuple(f"c{i}" for i in range(choices)), number % 3
    )


TRAIN = tuple(make(i, "train", 3 if i % 4 == 1 else 4) for i in range(12))
CALIBRATION = tuple(make(i, "held") for i in range(5))
TEST = tuple(make(i, "test", 3 if i % 2 else 4) for i in range(7))


def qwen(seed=0, **options):
    return tiny_qwen(seed, **{"vocab_size": 100, "dtype": torch.float32, "implementation": "grouped_mm", **options})


def finetuner(model=None, **options):
    return ExpertFinetuner(qwen() if model is None else model, **{"learning_rate": 0.01, **options})


def trainer(folder, *callbacks, **options):
    defaults = {
        "accelerator": "cpu",
        "max_epochs": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
    }
    return L.Trainer(default_root_dir=folder, callbacks=list(callbacks), **{**defaults, **options})


def copied(module):
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def prepare(module, data):
    """What a trainer does before it runs either."""
    data.setup()
    module._answer_ids = data.answer_token_ids
