"""A Lightning callback that writes what `trainer.predict` predicts with a method into a file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import BasePredictionWriter
from torch import Tensor

from bmoe_lightning.callback import BayesianMoECallback
from bmoe_lightning.data.batches import EncodedQuestions
from bmoe_lightning.data.questions import LETTERS
from bmoe_lightning.experts.logits_contract import joined_logits
from bmoe_lightning.laplace.predictive import entropy
from bmoe_lightning.serving.prediction_files import PREDICTION_SUFFIXES, write_prediction_file
from bmoe_lightning.serving.predictions import SCORE_COLUMNS, ServedPredictions
from bmoe_lightning.text_callback import BayesianTextCallback
from bmoe_lightning.trainer.checks import is_trial
from bmoe_lightning.trainer.data_passes import as_list
from bmoe_lightning.trainer.lightning_internals import has_batch_indices
from bmoe_lightning.trainer.predict_step import predicted_labels
from bmoe_lightning.utils.distributed import gather_examples, gather_number, together
from bmoe_lightning.utils.messages import shown
from bmoe_lightning.utils.writable_folder import make_writable

_UNKNOWN = -1  # label


@dataclass(frozen=True)
class _Rows:
    """Predictions of entries of a data set, on the CPU.

    Attributes:
        positions: Position in the data set `[n]` int64.
        log_probs: Log-probabilities `[n, K]` float64.
        scores: Those of `SCORE_COLUMNS` `[n, 2]` float64, NaN where a method has none.
        labels: Labels `[n]` int64, `_UNKNOWN` where there is none.
    """

    positions: Tensor
    log_probs: Tensor
    scores: Tensor
    labels: Tensor

    @classmethod
    def joined(cls, parts: Sequence[_Rows]) -> _Rows:
        """The rows of several batches, maybe none."""
        empty = torch.zeros(0, dtype=torch.int64)
        parts = [cls(empty, torch.zeros(0, 0).double(), torch.zeros(0, len(SCORE_COLUMNS)).double(), empty), *parts]
        return cls(
            torch.cat([part.positions for part in parts]),
            joined_logits([part.log_probs for part in parts]),
            torch.cat([part.scores for part in parts]),
            torch.cat([part.labels for part in parts]),
        )

    def gathered(self) -> _Rows:
        """The rows of all ranks in the order of the data set, each entry once. A collective."""
        width = max(gather_number(self.log_probs.shape[1]))
        whole = [self.positions, joined_logits([self.log_probs], width), self.scores, self.labels]
        positions, log_probs, scores, labels = map(gather_examples, whole)
        order = positions.argsort(stable=True)
        ordered = positions[order]
        first = torch.ones(len(order), dtype=torch.bool)
        first[1:] = ordered[1:] != ordered[:-1]
        order = order[first]
        return _Rows(positions[order], log_probs[order], scores[order], labels[order])


@dataclass
class _Loader:
    """What is known of a predict loader.

    Attributes:
        path: File of its predictions.
        source: The loader.
        parts: Rows of the batches so far.
    """

    path: Path
    source: Any
    parts: list[_Rows] = field(default_factory=list)

    @property
    def num_rows(self) -> int:
        """Number of rows so far."""
        return sum(len(part.positions) for part in self.parts)


class PredictionWriter(BasePredictionWriter):
    """Writes what `trainer.predict` predicts with a method into a file, a row for each entry of the data set.

    Stands beside a `BayesianMoECallback` with a `predict_method`. Rows have the columns of `bmoe-lightning predict`:
    `id`, `prediction`, `probabilities`, `entropy`, and, where the method has them, `mutual_information` and
    `logit_variance`; and `answer`, where the label is known. A row whose score is not a number lacks it. The `id` is
    that of the question, if the loader is one of `MultipleChoiceDataModule`, and the position in the data set
    otherwise. Rows are in the order of the data set, each entry once, for any number of processes and any order of the
    loader. Several loaders have a file each, with the number of the loader at the end of its name,
    `predictions_0.jsonl`; that of a loader without entries is empty.

    Rank zero writes when all is predicted, under a temporary name first; a stopped run leaves no file, and a
    `fast_dev_run` writes none. Until then a few numbers for each entry are in CPU memory; so
    `trainer.predict(return_predictions=False)` does not store covariances.

    Examples:
        >>> callback = BayesianMoECallback(predict_method="map", dirpath="posterior")    # doctest: +SKIP
        >>> writer = PredictionWriter("predictions.jsonl")                               # doctest: +SKIP
        >>> trainer = L.Trainer(callbacks=[callback, writer])                            # doctest: +SKIP
        >>> trainer.predict(module, datamodule=data, return_predictions=False)           # doctest: +SKIP

    Args:
        path: File to write, in JSON Lines (`.jsonl`) or parquet (`.parquet`). Its folder is created if missing; one
            that cannot be written to is refused before the model runs.
        class_names: Names of the classes for `prediction` and `answer`; by default the letters of choices, from A on.
        overwrite: Whether to replace an existing file.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: In `setup`, before any work is done, if the file has another suffix, or class names are empty,
            repeated or none. A `ValueError` of the constructor would be buried by LightningCLI among what else the
            YAML of a callback may be.
    """

    def __init__(self, path: str, class_names: Sequence[str] | None = None, overwrite: bool = False) -> None:
        super().__init__(write_interval="batch")
        _check_types(path, class_names, overwrite)
        self.path = Path(path)
        self.class_names = LETTERS if class_names is None else tuple(class_names)
        self.overwrite = overwrite
        self._loaders: list[_Loader] = []

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Check the arguments, that a callback predicts, and that the file can be written and is not there yet."""
        super().setup(trainer, pl_module, stage)
        self._check_values()
        if stage != "predict":
            return
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        predicting = [other for other in callbacks if isinstance(other, BayesianMoECallback) and other.predict_method]
        if any(isinstance(other, BayesianTextCallback) for other in predicting):
            raise ValueError(
                "PredictionWriter writes probabilities of classes, and BayesianTextCallback scores texts, which have "
                "none; leave PredictionWriter out, and store what trainer.predict returns"
            )
        if not predicting:
            raise ValueError(
                "PredictionWriter writes what a method predicts, and no callback of the trainer predicts with one; add "
                "BayesianMoECallback(predict_method=...), or set it"
            )
        writes = trainer.is_global_zero and not is_trial(trainer)
        together(partial(self._check_file, writes=writes), distributed=trainer.world_size > 1)

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check that the file of each loader can be written, and that its rows have an order."""
        sources = as_list(trainer.predict_dataloaders)
        paths = [self.path]
        if len(sources) > 1:
            names = [f"{self.path.stem}_{number}{self.path.suffix}" for number in range(len(sources))]
            paths = [self.path.with_name(name) for name in names]
        self._loaders = [_Loader(path, source) for path, source in zip(paths, sources, strict=True)]
        check = partial(self._check_loaders, trainer.world_size)
        together(check, distributed=trainer.world_size > 1)

    def write_on_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Store the predictions of a batch until the end."""
        loader = self._loaders[dataloader_idx]
        log_probs = prediction["log_probs"].cpu()
        count, num_classes = log_probs.shape
        if num_classes > len(self.class_names):
            raise ValueError(
                f"there are {num_classes} classes, and {len(self.class_names)} of them have a name; pass "
                "PredictionWriter(class_names=[...])"
            )
        positions = torch.arange(count) + loader.num_rows
        if has_batch_indices(loader.source):
            positions = torch.tensor(batch_indices, dtype=torch.int64)
        if len(positions) != count:
            raise ValueError(
                f"a batch of {len(positions)} entries of the data set has {count} predictions, and PredictionWriter "
                "writes one for each entry; use a data set with an entry for each example"
            )
        unknown = torch.full((count,), torch.nan, dtype=torch.float64)
        scores = [prediction[name].cpu() if name in prediction else unknown for name in SCORE_COLUMNS]
        loader.parts.append(
            _Rows(positions, log_probs, torch.stack(scores, dim=1), _labels(pl_module, num_classes, count))
        )

    def on_predict_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the files, on rank zero."""
        loaders, self._loaders = self._loaders, []
        rows = [_Rows.joined(loader.parts).gathered() for loader in loaders]
        writes = trainer.is_global_zero and not is_trial(trainer)
        write = partial(self._write, loaders, rows) if writes else _nothing
        together(write, distributed=trainer.world_size > 1)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Forget what was predicted."""
        self._loaders = []

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Forget what was predicted: Lightning does not call `teardown` after an exception."""
        self._loaders = []

    def _check_values(self) -> None:
        names = self.class_names
        if self.path.suffix not in PREDICTION_SUFFIXES:
            raise ValueError(f"path {self.path} must end in {' or '.join(PREDICTION_SUFFIXES)}")
        if not names or not all(map(str.strip, names)) or len(set(names)) != len(names):
            raise ValueError(f"class_names must be different names in the order of the classes, got {shown(names)}")

    def _check_file(self, *, writes: bool) -> None:
        self._check_missing(self.path)
        if writes:
            make_writable(self.path.parent, "the predictions", "give PredictionWriter another path", dry=True)

    def _check_missing(self, path: Path) -> None:
        if path.is_dir():
            raise ValueError(f"{path} is a folder; pass the path of a file")
        if path.exists() and not self.overwrite:
            raise ValueError(f"{path} exists; pass PredictionWriter(overwrite=True) to replace it, or another path")

    def _check_loaders(self, world_size: int) -> None:
        for loader in self._loaders:
            self._check_missing(loader.path)
            if world_size > 1 and not has_batch_indices(loader.source):
                raise ValueError(
                    f"on {world_size} ranks PredictionWriter orders rows by the entries that a batch sampler chooses, "
                    f"and this {type(loader.source).__name__} has none; predict in one process, or from a DataLoader "
                    "over a data set with a length"
                )

    def _write(self, loaders: Sequence[_Loader], rows: Sequence[_Rows]) -> None:
        # All lines before the first file, so that rows which cannot be told leave none.
        lines = [list(self._lines(loader, found)) for loader, found in zip(loaders, rows, strict=True)]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        for loader, of_loader in zip(loaders, lines, strict=True):
            write_prediction_file(loader.path, of_loader.__iter__)

    def _lines(self, loader: _Loader, rows: _Rows) -> Iterator[str]:
        """The rows of a file, as lines of JSON."""
        if not len(rows.positions):
            return
        scores = {
            name: values
            for name, values in zip(SCORE_COLUMNS, rows.scores.unbind(1), strict=True)
            if not bool(values.isnan().all())
        }
        found = ServedPredictions(rows.log_probs, entropy(rows.log_probs), **scores)
        dataset = getattr(loader.source, "dataset", None)
        questions = dataset.questions if isinstance(dataset, EncodedQuestions) else None
        ids = [str(position) if questions is None else questions[position].id for position in rows.positions.tolist()]
        # Absent classes follow the others, as choices that a question lacks do.
        present = torch.arange(1, rows.log_probs.shape[1] + 1) * (rows.log_probs != -torch.inf)
        of_rows = found.rows_of(ids, present.amax(1).tolist(), self.class_names)
        for row, label in zip(of_rows, rows.labels.tolist(), strict=True):
            if label != _UNKNOWN:
                row["answer"] = self.class_names[label]
            yield f"{json.dumps(row)}\n"


def _check_types(path: object, names: object, overwrite: object) -> None:
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"path must be the path of a file, got {shown(path)}")
    entries = names if isinstance(names, Sequence) and not isinstance(names, str) else [None]
    if names is not None and not all(isinstance(name, str) for name in entries):
        raise TypeError(f"class_names must be a list of names in the order of the classes, got {shown(names)}")
    if not isinstance(overwrite, bool):
        raise TypeError(f"overwrite must be True or False, got {shown(overwrite)}")


def _labels(module: L.LightningModule, num_classes: int, count: int) -> Tensor:
    """The labels of a batch `[B]` int64, `_UNKNOWN` where there is none."""
    labels = predicted_labels(module)
    if not isinstance(labels, Tensor) or labels.shape != (count,) or labels.is_floating_point():
        return torch.full((count,), _UNKNOWN, dtype=torch.int64)
    labels = labels.cpu().long()
    return torch.where((labels >= 0) & (labels < num_classes), labels, _UNKNOWN)


def _nothing() -> None:
    """What the other ranks do while rank zero writes."""
