"""Write a fitted temperature into the generation_config.json of a model folder."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from bmoe_lightning.command.given import served_run, written
from bmoe_lightning.methods.base import TEMPERATURE
from bmoe_lightning.methods.fit_result import FitResult
from bmoe_lightning.methods.storage import load_fit
from bmoe_lightning.models.loading import load_causal_model
from bmoe_lightning.serving.loading import Served, fitted_methods
from bmoe_lightning.serving.manifest import MANIFEST_FILE, Manifest
from bmoe_lightning.serving.question_format import ServedModule
from bmoe_lightning.utils.atomic_io import write_text
from bmoe_lightning.utils.file_digest import digest_of

PROVENANCE = "calibration"
"""Entry of generation_config.json that says where the temperature is from; transformers keeps and ignores it."""
_CONFIG_FILE = "generation_config.json"


def export_temperature(given: argparse.Namespace) -> None:
    """Write a temperature; see `bmoe-lightning export-temperature --help`.

    Args:
        given: Options of the command.

    Raises:
        ValueError: If the run or the folder cannot be used, or the method has no temperature of tokens.
        WeightMismatchError: If the model has other weights than the temperature was fitted to.
        OSError: If a file cannot be read or written.
    """
    run = Path(given.run)
    served = served_run(run)
    if served.questions.answer_token_ids is None:
        raise ValueError(
            "methods of this model were fitted to log-probabilities of the texts of choices, so that their temperature "
            "is none of tokens; fit them to letters or words"
        )
    fitted = load_fit(served.fit)[0]
    temperature = temperature_of(served, fitted, given.method)
    folder = _model_folder(served, given.model)
    _check_weights(served, fitted, folder)
    config = GenerationConfig.from_pretrained(folder) if (folder / _CONFIG_FILE).is_file() else GenerationConfig()
    config.temperature, config.do_sample = temperature, True
    config._from_model_config = False  # otherwise transformers may make it again from config.json
    provenance = {"method": given.method, "fit": fitted.fit_id, "data": list(served.data)}
    setattr(config, PROVENANCE, provenance)
    # A temperature of 1 is left out of a difference from the defaults.
    entries = {**json.loads(config.to_json_string(use_diff=True)), TEMPERATURE: temperature, "do_sample": True}
    with written(str(folder / _CONFIG_FILE), folder):
        _write(folder, json.dumps(entries, indent=2, sort_keys=True) + "\n")
    print(f"{folder / _CONFIG_FILE} has the temperature {temperature:.4g} of {given.method}.")
    print(" ".join(served.data) or "What it was fitted on is not recorded.")
    print("It was fitted on the tokens of answers: check it on held-out text before you use it for anything else.")


def temperature_of(served: Served, fitted: FitResult, name: str) -> float:
    """The fitted temperature of a method that predicts with it alone.

    Args:
        served: The parts of the model.
        fitted: Result of its fit.
        name: Name of the method.

    Raises:
        ValueError: If there is no such method, or it predicts with something else.
    """
    methods = {method.name: method for method in served.methods or fitted_methods(fitted)}
    states: dict[str, Any] = {
        method.name: state
        for method in methods.values()
        if method.is_fitted_method
        and TEMPERATURE in (state := fitted.state_of(method))
        and not method.curvatures_of(state)
        and not method.is_ensemble
    }
    if name not in states:
        known = f"has no method {name!r}" if name not in methods else f"predicts {name!r} with more than a temperature"
        raise ValueError(f"this model {known}; its methods with one temperature are {', '.join(states) or 'none'}")
    return float(states[name][TEMPERATURE])


def _model_folder(served: Served, given: str | None) -> Path:
    folder = Path(served.model if given is None else given)
    if given is None and served.weights is not None:
        raise ValueError(
            "this run has its fine-tuned weights in a file of its own; give --model with the folder of the fine-tuned "
            "model, which CalibratedModel.save_pretrained or --save-model of the recipe writes"
        )
    if not (folder / "config.json").is_file():
        found = "has no config.json" if folder.is_dir() else "is no folder"
        raise ValueError(
            f"{'' if given is None else '--model '}{folder} {found}; give --model with the folder of a model in the "
            "format of transformers"
        )
    return folder


def _check_weights(served: Served, fitted: FitResult, folder: Path) -> None:
    """Refuse a model that has other weights than the temperature was fitted to."""
    manifest = Manifest.read(folder) if (folder / MANIFEST_FILE).is_file() else None
    if manifest is not None and (folder / manifest.fit).resolve() == served.fit.resolve():
        return  # the weights are those of the digests, which were verified
    fitted.check_weights(ServedModule(load_causal_model(str(folder))))


def _write(folder: Path, text: str) -> None:
    """Write the file. The manifest of a saved model is valid at any time: without its digest before, with it after."""
    manifest = Manifest.read(folder) if (folder / MANIFEST_FILE).is_file() else None
    if manifest is None or not manifest.sha256:
        write_text(folder / _CONFIG_FILE, text)
        return
    digests = {name: digest for name, digest in manifest.sha256.items() if name != _CONFIG_FILE}
    replace(manifest, sha256=digests).write(folder)
    write_text(folder / _CONFIG_FILE, text)
    replace(manifest, sha256={**digests, _CONFIG_FILE: digest_of(folder / _CONFIG_FILE)}).write(folder)
