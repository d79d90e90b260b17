"""The files of the further fine-tuning runs that a method predicts with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bmoe_lightning.methods import Method
from bmoe_lightning.methods.fit_index import has_fit
from bmoe_lightning.methods.storage import load_fit


def with_files(method: Method, weights: Callable[[int], Path], fit: Callable[[int], Path]) -> Method:
    """A method with the weights of each further fine-tuning run that it needs, and the folders of the fits to these.

    Args:
        method: Method.
        weights: The file with the weights of a further run, by its index from 1.
        fit: The folder with the fit to these weights, called after all files are there.
    """
    needs = method.needs
    if not needs.runs:
        return method
    indices = range(1, needs.runs + 1)
    files: dict[str, Any] = {"runs": tuple(str(weights(index)) for index in indices)}
    if needs.run_methods:
        files["fits"] = tuple(str(fit(index)) for index in indices)
    return replace(method, **files)


def is_finished(methods: Sequence[Method], folder: Path) -> bool:
    """Whether a folder has a fit of each method; a damaged one stays as it is.

    Args:
        methods: Methods; for none there need not be a fit.
        folder: Folder of the fit.
    """
    if not methods:
        return True
    try:
        fit = load_fit(folder)[0] if has_fit(folder) else None
    except (ValueError, FileNotFoundError):
        return False
    return fit is not None and all(map(fit.is_finished, methods))
