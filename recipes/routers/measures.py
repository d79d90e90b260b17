"""The stability of routes of each method on the stored fine-tuned weights, and its file, which is not made twice."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import lightning as L
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from bmoe_lightning import MultipleChoiceDataModule
from bmoe_lightning.base_finetuner import Finetuner
from bmoe_lightning.methods import BatchView, FitResult, Method
from bmoe_lightning.methods.storage import load_fit
from bmoe_lightning.routers.noise_sweep import GAMMAS, Stability, noise_sweep
from bmoe_lightning.trainer.data_passes import DataPass
from bmoe_lightning.utils.file_header import damaged
from bmoe_lightning.utils.json_io import read_json_file, write_json_file
from recipes.qwen_obqa.seed_run import SeedRun
from recipes.qwen_obqa.stored_predictions import origin_of_predictions
from recipes.routers.methods import few_samples

Split = Literal["test", "calibration"]
"""The questions on which the stability is measured."""

MEASURES = "stability"
_FORMAT = "stability of routes"
_VERSION = 1
_REMEDY = "delete it, and run the command that made the study again"
_MOST_ROUTES = 4
"""Number of routes over which the index is averaged, for methods that predict along each."""
_OTHER_DRAW = 1_000_003
"""What the seed of another draw differs by, which is more than the number of seeds."""


@dataclass(frozen=True)
class StoredStability:
    """Where the stability of a method is stored.

    Attributes:
        output: Folder of the study.
        seed: Seed of the run.
        method: Name of the method.
        split: The questions.
    """

    output: Path
    seed: int
    method: str
    split: Split = "test"

    @property
    def path(self) -> Path:
        """The file."""
        folder = self.output / MEASURES / f"seed-{self.seed}"
        return (folder if self.split == "test" else folder / self.split) / f"{self.method}.json"

    def has(self, origin: Mapping[str, Any]) -> bool:
        """Whether it was measured with this fit, and on these questions.

        Args:
            origin: What it is made with.

        Warns:
            UserWarning: If the file is damaged; it is then treated as missing.
        """
        try:
            return bool(self._read()["origin"] == origin)
        except FileNotFoundError:
            return False
        except (ValueError, KeyError) as error:
            warnings.warn(f"{error} The stability is measured again", stacklevel=2)
            return False

    def write(self, origin: Mapping[str, Any], found: Stability) -> None:
        """Write what was measured.

        Args:
            origin: What it is made with.
            found: The stability.
        """
        content = {
            "origin": dict(origin),
            "embeddings": {str(gamma): dict(indices) for gamma, indices in found.embeddings.items()},
            "inputs": {str(gamma): dict(indices) for gamma, indices in found.inputs.items()},
            "floor": dict(found.floor),
            "chance": dict(found.chance),
        }
        write_json_file(self.path, format=_FORMAT, version=_VERSION, description=content)

    def read(self) -> Stability:
        """Read it.

        Raises:
            FileNotFoundError: If it was not measured.
            ValueError: If the file is damaged.
        """
        content = self._read()
        try:
            embeddings, inputs = (
                {float(gamma): _indices(found) for gamma, found in content[place].items()}
                for place in ("embeddings", "inputs")
            )
            return Stability(embeddings, inputs, _indices(content["floor"]), _indices(content["chance"]))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise damaged(self.path, _FORMAT, f"it is incomplete ({error!r})", _REMEDY) from error

    def _read(self) -> dict[str, Any]:
        return read_json_file(self.path, format=_FORMAT, version=_VERSION, remedy=_REMEDY).description


def measure_stability(
    output: Path, run: SeedRun, methods: Sequence[Method], num_questions: int, split: Split = "test"
) -> None:
    """Measure the stability of the routes of methods whose fit is stored, unless it is stored.

    Args:
        output: Folder of the study, which this process has locked.
        run: The finished run of a seed.
        methods: Methods of the run, no ensembles.
        num_questions: Number of questions.
        split: Which questions.
    """
    wanted = {method: {**origin_of_predictions(run.predictions.path(method)), "questions": num_questions}
              for method in methods}  # fmt: skip
    stored = {method: StoredStability(output, run.seed, method.name, split) for method in methods}
    missing = [method for method in methods if not stored[method].has(wanted[method])]
    if not missing:
        return
    names = ", ".join(method.name for method in missing)
    print(f"[seed {run.seed}] stability of routes ({split} questions): {names}", flush=True)
    fitted = load_fit(run.fit_folder)[0]

    def measure(trainer: L.Trainer, module: Finetuner, _prior_mean: Mapping[str, Tensor] | None) -> None:
        batches = _batches(trainer, num_questions, split)
        for method in missing:
            predict = partial(_predict, trainer, module, fitted, method)
            found = noise_sweep(module, predict, batches, seed=run.seed, gammas=GAMMAS)
            stored[method].write(wanted[method], found)

    run.with_trained(measure)


def read_stability(
    output: Path, seeds: Sequence[int], methods: Sequence[str], split: Split = "test"
) -> dict[str, dict[int, Stability]]:
    """The stored stability of methods by seed; without those that were not measured.

    Args:
        output: Folder of the study.
        seeds: Seeds.
        methods: Names of methods.
        split: The questions.

    Raises:
        ValueError: If a file is damaged.
    """
    found: dict[str, dict[int, Stability]] = {}
    for method in methods:
        for seed in seeds:
            stored = StoredStability(output, seed, method, split)
            if stored.path.is_file():
                found.setdefault(method, {})[seed] = stored.read()
    return found


def _indices(found: Mapping[str, Any]) -> dict[str, float]:
    return {str(name): float(value) for name, value in found.items()}


def _batches(trainer: L.Trainer, num_questions: int, split: Split) -> DataPass:
    data = trainer.datamodule  # type: ignore[attr-defined]  # set by trainer.fit
    assert isinstance(data, MultipleChoiceDataModule)
    loader = data.test_dataloader() if split == "test" else data.calibration_dataloader()
    chosen = Subset(loader.dataset, range(min(num_questions, len(data.questions(split)))))
    few = DataLoader(chosen, batch_size=data.eval_batch_size, collate_fn=loader.collate_fn)
    return DataPass(trainer, few, len(few), "Stability", repeats=True)


def _predict(trainer: L.Trainer, module: Finetuner, fitted: FitResult, method: Method, batch: Any, draw: int) -> None:
    def class_logits(model: nn.Module, batch: object) -> tuple[Tensor, Tensor | None]:
        with trainer.precision_plugin.forward_context():
            return model.class_logits(batch)  # type: ignore[operator]  # a Finetuner

    posteriors = fitted.posteriors_for(method.curvatures_of(fitted.state_of(method)), module)
    view = BatchView(module, class_logits, batch, posteriors, seed=fitted.seed + _OTHER_DRAW * draw)
    few_samples(method, _MOST_ROUTES).log_probs(view, fitted.state_of(method))
