"""Figures for loggers that have images: which get them, under which names."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, WandbLogger

from bmoe_lightning.report import MethodResult, summarise
from bmoe_lightning.trainer import logged_figures
from bmoe_lightning.trainer.logged_figures import figure_writers, log_figures


class Wandb(WandbLogger):
    """One that records images, and needs no package."""

    def __init__(self, seen):
        self.seen = seen

    def log_image(self, key, images, step=None, **_):
        self.seen.append((key, step, [(image.shape[2], image.dtype.name) for image in images]))


class MLflow(MLFlowLogger):
    """The same of the other kind."""

    run_id = "run"

    def __init__(self, seen):
        self.seen = seen

    @property
    def experiment(self):
        return self

    def log_figure(self, run_id, figure, artifact_file):
        self.seen.append((artifact_file, run_id, len(figure.axes) > 0))


@pytest.fixture
def results():
    log_probs = torch.randn(40, 3, generator=torch.Generator().manual_seed(0)).double().log_softmax(-1)
    return [MethodResult("map", "MAP", 0, log_probs, torch.arange(40) % 3, tuple(map(str, range(40))))]


@pytest.mark.parametrize("prefix", ["", "two"])
def test_those_with_images_get_two(tmp_path, results, prefix):
    seen = []
    writers = figure_writers([CSVLogger(tmp_path), Wandb(seen), MLflow(seen)], prefix)
    log_figures(writers, results, summarise(results), "test_1", 7)
    place = f"{prefix}/test_1" if prefix else "test_1"
    assert seen == [
        (f"{place}/best_method/nll", 7, [(3, "uint8")]),
        (f"{place}/best_method/nll-7.png", "run", True),
        (f"{place}/reliability/all_methods", 7, [(3, "uint8")]),
        (f"{place}/reliability/all_methods-7.png", "run", True),
    ]


def test_without_matplotlib_none(monkeypatch, results):
    monkeypatch.setattr(logged_figures, "matplotlib_available", lambda: False)
    seen = []
    log_figures(figure_writers([Wandb(seen)]), results, summarise(results), "test", 7)
    assert figure_writers([Wandb(seen)]) == seen == []
