"""What importing the package brings, and which names it shows."""

import subprocess
import sys
from importlib import import_module

import pytest

import bmoe_lightning

SLOW_TO_IMPORT = (
    "lightning",
    "pytorch_lightning",
    "transformers",
    "datasets",
    "matplotlib",
    "torchmetrics",
    "tensorboard",
)
SERVING = """
import sys
import torch
from torch import nn

from bmoe_lightning import LaplacePosterior
from bmoe_lightning.curvature import collect_factors
from bmoe_lightning.experts import find_linear_layers

model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
batches = [torch.randn(5, 3), torch.randn(5, 3)]


def class_logits(model, batch):
    return model(batch), None


factors = collect_factors(model, class_logits, batches, rank=2, layers=find_linear_layers(model, "2"))
posterior = LaplacePosterior(factors, prior_precision=1.0)
posterior.save(sys.argv[1])
probabilities = LaplacePosterior.load(sys.argv[1]).predict(model, class_logits, batches[0], link="probit").exp()
assert torch.allclose(probabilities.sum(-1), torch.ones(5, dtype=probabilities.dtype))
"""


def imported_by(code, *arguments):
    """Which of the slow packages a fresh process has imported after running code."""
    code += f"\nprint([name for name in {SLOW_TO_IMPORT} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    return run.stdout.strip()


def test_serving_a_posterior_imports_nothing_slow_beside_torch(tmp_path):
    assert imported_by(SERVING, str(tmp_path / "posterior.safetensors")) == "[]"


@pytest.mark.parametrize("package", ["curvature", "methods", "data"])
def test_packages_below_the_trainer_import_neither_lightning_nor_transformers(package):
    assert imported_by(f"import sys, bmoe_lightning.{package}") == "[]"


@pytest.mark.parametrize("package", ["", ".data", ".methods"])
def test_lazy_names_are_listed_and_importable(package):
    module = import_module(f"bmoe_lightning{package}")
    assert set(module.__all__) <= set(dir(module))
    for name in dir(module):
        assert getattr(module, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        module.no_such_name  # noqa: B018


def test_public_names_are_shown():
    assert dir(bmoe_lightning) == sorted(bmoe_lightning.__all__)
    assert {"BayesianMoECallback", "ExpertFinetuner", "LaplacePosterior", "MultipleChoiceDataModule"} < set(
        dir(bmoe_lightning)
    )
