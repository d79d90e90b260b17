"""Dry runs of the main job, and the logits of a model on their test split."""

from __future__ import annotations

import torch

from bmoe_lightning.models.answer_logits import answer_logits
from recipes.qwen_obqa.__main__ import main
from recipes.qwen_obqa.methods import build_methods
from recipes.qwen_obqa.settings import Settings
from recipes.qwen_obqa.sources import prepare_source


def run(folder, *arguments):
    """Do a dry run through the command; its exit status."""
    torch.manual_seed(0)
    return main(["--dry-run", "--quiet", "--accelerator", "cpu", "--output-dir", str(folder), *arguments])


@torch.no_grad()
def logits_of(model, folder, **chosen):
    """Logits `[N, K]` float64 of a model in evaluation mode on the test split of the dry run in a folder."""
    chosen = {"methods": ("map", "temperature"), **chosen}
    settings = Settings(dry_run=True, quiet=True, output_dir=str(folder), **chosen).resolved()
    data = prepare_source(settings, build_methods(settings)).data(0)
    batches = data.test_dataloader()
    return torch.cat([answer_logits(model, batch, data.answer_token_ids).double() for batch in batches])
