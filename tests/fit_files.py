"""What the tests of stored fits share: a table of methods, its data, and what is in a folder."""

from __future__ import annotations

from methods_cases import RANK3
from oracles.models import answer_logits, split, toy_batch, toy_model

from bmoe_lightning.methods import MAP, LaplaceLPO, TemperatureScaling, evaluate, save_snapshot
from bmoe_lightning.methods.storage import load_fit

DOWN = "layers.0.mixture.crew.down_proj"
METHODS = (MAP(), TemperatureScaling(), LaplaceLPO(curvature=RANK3, num_samples=100))
BATCHES = split(toy_batch(num_rows=60, seed=3), 20, 20, 20)


def files_of(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def fitted_states(folder):
    """Every tensor of a stored fit by name: what its methods have fitted, and its factors."""
    fit = load_fit(folder)[0]
    states = {f"{name}.{key}": value for name, of in fit.methods.items() for key, value in of.state.items()}
    layers = [layer for posterior in fit.posteriors.values() for layer in posterior.factors.layers]
    return states | {f"{layer.name}.{key}": value for layer in layers for key, value in layer.tensors().items()}


def log_probs(fit, *methods):
    found = evaluate(methods or METHODS, fit, toy_model(), answer_logits, BATCHES)
    return {name: predictions.log_probs for name, predictions in found.items()}


def snapshot(folder, fit, epoch=0):
    path = folder / "snapshots" / f"{fit.fit_id[:8]}-epoch-{epoch:04d}.safetensors"
    save_snapshot(path, {DOWN: toy_model().get_parameter(DOWN)}, fit=fit.fit_id)
    return path
