"""What the numbers of a run were made from, as digests: its questions, its weights and its posteriors."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from bmoe_lightning.laplace import LaplacePosterior
from bmoe_lightning.methods import FitResult
from bmoe_lightning.methods.snapshots import FORMAT, VERSION
from bmoe_lightning.methods.storage import load_fit
from bmoe_lightning.utils.safetensors_io import opened_tensor_file, tensor_digest
from recipes.qwen_obqa.run_folder import fingerprint_of
from recipes.qwen_obqa.sources import Source

if TYPE_CHECKING:
    from recipes.qwen_obqa.seed_run import SeedRun


def stored_run_hashes(runs: Sequence[SeedRun]) -> dict[str, Any]:
    """The digests of `run_hashes`, with the fits that the runs have stored.

    Args:
        runs: The completed runs of all seeds, of one model and the same questions.
    """
    return run_hashes(runs[0].source, runs, {run.seed: load_fit(run.fit_folder)[0] for run in runs})


def data_hashes(source: Source) -> dict[str, str]:
    """The digest of the questions of each split, and of those of each further test set by its name.

    Args:
        source: Model and questions.
    """
    parts = {"train": source.train, "calibration": source.calibration, "test": source.test}
    parts |= {f"test of {name}": other.splits.test for name, other in source.others.items()}
    return {name: fingerprint_of(questions) for name, questions in parts.items()}


def run_hashes(source: Source, runs: Sequence[SeedRun], fits: Mapping[int, FitResult]) -> dict[str, Any]:
    """Digests of what a run's numbers were made from, as JSON values; the same in every run of the same command.

    Args:
        source: Model and questions.
        runs: The completed runs of all seeds.
        fits: Their fits by seed.

    Returns:
        `data`: see `data_hashes`. `seeds`: for each seed those of the weights before fine-tuning
        (empty for `--model`, which its name identifies) and after it (empty if their file was removed), of each
        posterior's factors by the digest of its curvature's options, and of all that methods have fitted.
    """
    seeds = {
        str(run.seed): {
            "pretrained_weights": source.model_hash(run.seed),
            "trained_weights": _weights(run),
            "posteriors": {key: _digest(_factors(found)) for key, found in fits[run.seed].posteriors.items()},
            "methods": {name: _digest(method.state) for name, method in fits[run.seed].methods.items()},
        }
        for run in runs
    }
    return {"data": data_hashes(source), "seeds": seeds}


def _weights(run: SeedRun) -> str:
    if not run.trained_weights.is_file():
        return ""
    with opened_tensor_file(run.trained_weights, format=FORMAT, version=VERSION) as file:
        return file.tensor_digest


def _factors(posterior: LaplacePosterior) -> dict[str, Tensor]:
    layers = posterior.factors.layers
    return {f"{layer.name}.{name}": value for layer in layers for name, value in layer.tensors().items()}


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 digest of tensors, as that of a file with them."""
    digests = {name: tensor_digest(name, value) for name, value in tensors.items()}
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()
