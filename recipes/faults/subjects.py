"""The two commands that faults are injected into: the recipe `qwen_obqa`, and a plain Lightning script."""

from __future__ import annotations

import hashlib
import json
import shutil
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter  # noqa: F401  # imported once, before processes are forked

from bmoe_lightning.methods.storage import load_fit
from bmoe_lightning.report import matplotlib_available, tensorboard
from bmoe_lightning.utils.safetensors_io import read_tensor_file, tensor_digest
from recipes.faults import lightning_script
from recipes.faults.forked import Ended, forked
from recipes.faults.injections import Inject, no_fault
from recipes.qwen_obqa import experiment  # noqa: F401  # likewise
from recipes.qwen_obqa.__main__ import main
from recipes.qwen_obqa.run_folder import FIT_FOLDER

RUN, ADAPTERS = (Path(__file__).with_name(name) for name in ("run.yaml", "adapters.yaml"))
_SAVED = "-saved"  # the fine-tuned model, beside the folder of its run
_PASSES = {  # stage: a function that it calls several times, and the call in which the signal comes
    "curvature": ("bmoe_lightning.curvature.pass_sums._add_batch", 2),
    "calibration": ("bmoe_lightning.methods.plain_passes._SplitBuilder.add", 2),
    "evaluation": ("bmoe_lightning.methods.evaluation.Evaluation.add", 2),
}


class Subject(ABC):
    """A command that is run again after a fault.

    Attributes:
        name: Name for the table.
        stages: A function that each stage of the run calls, and the call at which a signal comes.
        tells: Whether it ends with one line for the user rather than with a traceback.
    """

    name: ClassVar[str]
    stages: ClassVar[Mapping[str, tuple[str, int]]]
    tells: ClassVar[bool]

    @abstractmethod
    def command(self, folder: Path) -> int:
        """Run the command in this process; returns its exit status."""

    @abstractmethod
    def content(self, folder: Path) -> dict[str, str]:
        """Digests of everything that a finished run has computed; random ids and times are left out."""

    def numbers(self, folder: Path) -> dict[str, str]:
        """Those of the results and predictions alone; by default of everything."""
        return self.content(folder)

    @abstractmethod
    def leftovers(self, folder: Path) -> list[Path]:
        """Files that a finished run should not have."""

    def run(self, folder: Path, inject: Inject = no_fault) -> Ended:
        """Run the command in a process of its own.

        Args:
            folder: Folder of the run.
            inject: The fault.
        """
        told: list[Any] = []

        def action() -> int:
            told.append(inject(folder))
            return self.command(folder)

        return forked(action, lambda: told[0]())

    def differences(self, folder: Path, expected: Mapping[str, str]) -> list[str]:
        """What differs from a run without faults, and what a killed process has left."""
        found = self.content(folder)
        names = [name for name in sorted(found.keys() | expected.keys()) if found.get(name) != expected.get(name)]
        return [*names, *(str(path.relative_to(folder.parent)) for path in self.leftovers(folder))]

    def remove(self, folder: Path) -> None:
        """Remove all files of a run."""
        for path in (folder, Path(f"{folder}{_SAVED}")):
            shutil.rmtree(path, ignore_errors=True)


class RecipeRun(Subject):
    """A short run of `recipes.qwen_obqa`.

    Args:
        config: YAML file of its options.
        flags: Further options.
        saves: Whether it saves the fine-tuned model.
    """

    name = "recipe"
    tells = True
    stages: ClassVar = {
        "training": ("bmoe_lightning.finetuner.ExpertFinetuner.training_step", 1),
        **_PASSES,
        "report": ("recipes.qwen_obqa.reporting.write_results", 1),
    }

    def __init__(self, config: Path = RUN, flags: tuple[str, ...] = (), *, saves: bool = True) -> None:
        self._config, self._flags, self._saves = config, flags, saves

    def command(self, folder: Path) -> int:
        """Run the recipe."""
        torch.manual_seed(0)
        saves = ["--save-model", f"{folder}{_SAVED}"] if self._saves else []
        return main(["--config", str(self._config), *self._flags, "--output-dir", str(folder), *saves])

    def content(self, folder: Path) -> dict[str, str]:
        """Results, figures, predictions, weights, fits and the saved model."""
        found = self.numbers(folder)
        for seed in sorted(folder.glob("seed-*")):
            for path in sorted([*seed.glob("*.safetensors"), *seed.glob("predictions/*.safetensors")]):
                kind = "predictions" if path.parent.name == "predictions" else "snapshot"
                found |= _digests(path.name, read_tensor_file(path, format=kind, version=1).tensors)
            found |= _fit(seed / FIT_FOLDER)
        for path in sorted(Path(f"{folder}{_SAVED}").glob("*")):
            # The record names the model that was trained.
            content = path.read_bytes().replace(str(folder).encode(), b"")
            found[f"saved {path.name}"] = hashlib.sha256(content).hexdigest()
        return found

    def numbers(self, folder: Path) -> dict[str, str]:
        """Results, figures and the predictions of the report."""
        found = {"results": json.dumps(json.loads((folder / "results.json").read_text())["rows"])}
        for name in ("results.csv", "results.md", "predictions.jsonl"):
            found[name] = (folder / name).read_text()
        for path in sorted((folder / "figures").glob("*.png")):
            found[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
        return found

    def leftovers(self, folder: Path) -> list[Path]:
        """Temporary files, sums of curvature passes, unfinished folders, and event files of killed processes."""
        found = _temporary(folder)
        found += folder.parent.glob(f".unfinished-{folder.name}{_SAVED}*")
        for place in (*folder.glob("tensorboard"), *folder.glob("tensorboard/*"), *folder.glob("training_curves/*")):
            found += list(place.glob("events.*"))[1:]
        return found + list(folder.glob(f"seed-*/{FIT_FOLDER}/methods-*"))[1:]


class ScriptRun(Subject):
    """A plain Lightning script with the callback; see `lightning_script`."""

    name = "Lightning script"
    tells = False
    stages: ClassVar = {"training": ("recipes.faults.lightning_script.Classifier.training_step", 6), **_PASSES}

    def __init__(self) -> None:
        self._methods = yaml.safe_load(RUN.read_text(encoding="utf-8"))["methods"]

    def command(self, folder: Path) -> int:
        """Run the script."""
        return lightning_script.run(folder, self._methods)

    def content(self, folder: Path) -> dict[str, str]:
        """Metrics, predictions and the fit."""
        return self.numbers(folder) | _fit(folder / lightning_script.FIT_FOLDER)

    def numbers(self, folder: Path) -> dict[str, str]:
        """Metrics and predictions."""
        predictions = load_file(folder / lightning_script.PREDICTIONS)
        return {"metrics": (folder / lightning_script.METRICS).read_text()} | _digests("predictions", predictions)

    def leftovers(self, folder: Path) -> list[Path]:
        """Temporary files, sums of curvature passes, and states of methods that no index names."""
        return _temporary(folder) + list(folder.glob(f"{lightning_script.FIT_FOLDER}/methods-*"))[1:]


def draw_nothing() -> None:
    """Leave out the drawing of figures, most of a short run's time; their files are still written."""
    image = torch.zeros(3, 4, 4, dtype=torch.uint8).numpy()
    vars(tensorboard)["figure_image"] = lambda figure: image  # noqa: ARG005
    if matplotlib_available():
        from matplotlib.figure import Figure

        Figure.savefig = lambda self, target, **_: target.write(b"figure")  # type: ignore[method-assign]  # noqa: ARG005


def _fit(folder: Path) -> dict[str, str]:
    fit, snapshots = load_fit(folder)
    tensors: dict[str, Tensor] = {}
    for name, method in fit.methods.items():
        tensors |= {f"{name}.{key}": value for key, value in method.state.items()}
    for digest, posterior in fit.posteriors.items():
        for layer in posterior.factors.layers:
            tensors |= {f"{digest} {layer.name}.{key}": value for key, value in layer.tensors().items()}
    found = _digests("fit", tensors)
    for number, path in enumerate(snapshots):
        found |= _digests(f"snapshot {number}", read_tensor_file(path, format="snapshot", version=1).tensors)
    return found


def _digests(place: str, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    return {f"{place} {name}": tensor_digest(name, value) for name, value in tensors.items()}


def _temporary(folder: Path) -> list[Path]:
    found = [path for path in folder.rglob("*") if path.name.endswith(".tmp") or path.name.startswith(".unfinished-")]
    return found + list(folder.rglob("curvature_state*"))
