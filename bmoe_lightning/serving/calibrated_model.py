"""A fine-tuned model with its fitted methods, in plain PyTorch: loaded from a run or a folder, asked, and saved."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bmoe_lightning.data.questions import Question
from bmoe_lightning.data.truncation import TRUNCATED, TruncationWarning
from bmoe_lightning.methods.base import Method, check_method_names
from bmoe_lightning.methods.evaluation import Predictor
from bmoe_lightning.methods.fit_result import FitResult, NotFittedError
from bmoe_lightning.methods.registry import get_method, method_names
from bmoe_lightning.methods.storage import load_fit
from bmoe_lightning.serving.loading import Served, check_model_files, fitted_methods, load_served, read_model
from bmoe_lightning.serving.manifest import MANIFEST_FILE, check_precision
from bmoe_lightning.serving.predictions import ServedPredictions
from bmoe_lightning.serving.question_format import QuestionFormat, ServedModule
from bmoe_lightning.serving.questions import as_questions, labelled_questions

if TYPE_CHECKING:
    from bmoe_lightning.base_finetuner import Finetuner
    from bmoe_lightning.callback import BayesianMoECallback
    from bmoe_lightning.data import MultipleChoiceDataModule
    from bmoe_lightning.data.datamodule import Part
    from bmoe_lightning.metrics import PredictionSets
    from bmoe_lightning.metrics.conformal import ConformalScore

_BATCH_SIZE = 8
_BATCHES_OF_A_MEMBER = 16
_AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


@dataclass(frozen=True)
class CalibratedModel:
    """A fine-tuned model and the methods that were fitted to it.

    Its weights are compared with those of the fit when it is made. Methods with the same options predict here as they
    do in `trainer.test`. Predictions may be made from several threads; those of one model take turns.

    Attributes:
        module: The model, as `module.model`; predictions are in evaluation mode.
        tokenizer: Its tokenizer.
        questions: How questions are asked.
        fitted: Result of the fit.
        methods: Methods with distinct names.
        snapshots: Snapshots of trained weights that the fit has, for methods that need them.
        precision: Lightning's name of the precision of predictions, such as `32-true` or `bf16-mixed`.
        data: Sentences on what it was trained, fitted and tested on.
        results: Rows of its table on test questions: values by column.

    Raises:
        WeightMismatchError: If the model has other weights than the methods were fitted to.
        NotFittedError: If a method was not fitted.
        ValueError: If the model lacks a layer of the fit, there is no method, or two have the same name.
    """

    module: ServedModule
    tokenizer: PreTrainedTokenizerBase
    questions: QuestionFormat
    fitted: FitResult
    methods: tuple[Method, ...]
    snapshots: tuple[Path, ...] = ()
    precision: str = "32-true"
    data: tuple[str, ...] = ()
    results: tuple[Mapping[str, Any], ...] = ()

    def __post_init__(self) -> None:
        check_method_names(self.methods)
        check_precision(self.precision)
        self.fitted.check_weights(self.module)
        for method in self.methods:
            self.fitted.state_of(method)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        fit: str | Path | None = None,
        weights: str | Path | None = None,
        questions: QuestionFormat | None = None,
        methods: Sequence[str | Method] = (),
        precision: str = "32-true",
        device: torch.device | str = "cpu",
        verify: bool = True,
    ) -> CalibratedModel:
        """Load a model, its fit and its methods.

        Args:
            source: Folder of `save_pretrained` or of a run of `recipes.qwen_obqa`, which say all the rest; or folder or
                hub id of the model that was fine-tuned, with `fit` and `questions`.
            fit: Folder of the fit, `dirpath` of the callback.
            weights: The fine-tuned weights: a Lightning checkpoint, or a snapshot of trained weights; None if the files
                of the model have them.
            questions: How questions are asked.
            methods: Methods to predict with; by default all of the folder. Of a fit alone, those that were fitted; what
                an option of predictions had, such as a number of samples, is not known of it and has its default.
            precision: Lightning's name of the precision of the fit.
            device: Device of the model.
            verify: Whether to compare the files of a saved folder with their digests, and the model's configuration
                and tokenizer that a run's folder names with those of the fit. Weights are compared in any case.

        Raises:
            FileNotFoundError: If a file is missing.
            ModelUnavailableError: If the model cannot be loaded; see `load_causal_model`.
            WeightMismatchError: If the model has other weights than the methods were fitted to.
            NotFittedError: If a method was not fitted.
            ValueError: If a file is damaged or was changed, arguments exclude each other, or something does not fit
                together.
        """
        given = {"fit": fit, "weights": weights, "questions": questions}
        served = load_served(Path(source), methods, verify=verify)
        if served is None:
            if not Path(source).is_dir() and fit is None:
                raise FileNotFoundError(
                    f"there is no folder {source}; check the path, or give fit= for a model of the hub"
                )
            if fit is None or questions is None:
                raise ValueError(
                    f"{source} has no {MANIFEST_FILE}, so it is taken for a model; give fit= with the folder of its "
                    "fit, and questions= with its QuestionFormat"
                )
            served = Served.of_model(str(source), Path(fit), questions, weights, precision)
        elif any(value is not None for value in given.values()) or precision != "32-true":
            raise ValueError(
                f"{source} has a {MANIFEST_FILE}, which says what fit=, weights=, questions= and precision= would; "
                "leave them out"
            )
        if verify:
            check_model_files(served)
        offload = [curvature.digest for m in served.methods for curvature in m.curvatures if curvature.offload]
        fitted, snapshots = load_fit(served.fit, offload=offload)
        module, tokenizer = read_model(served)
        known = {method.name: method for method in served.methods or fitted_methods(fitted, methods)}
        chosen = [known.get(m) or get_method(m) if isinstance(m, str) else m for m in methods] or list(known.values())
        return cls(
            module.to(device),
            tokenizer,
            served.questions,
            fitted,
            tuple(chosen),
            tuple(snapshots),
            served.precision,
            served.data,
            served.results,
        )

    @classmethod
    def of_run(
        cls,
        module: Finetuner,
        data: MultipleChoiceDataModule,
        callback: BayesianMoECallback,
        *,
        precision: str | None = None,
    ) -> CalibratedModel:
        """The model of a finished training, as it is in memory; nothing about it is changed.

        Args:
            module: The fine-tuned module.
            data: Its DataModule, which has been set up.
            callback: Its callback, after the fit.
            precision: Lightning's name of the precision of the fit; by default that of the module's trainer, or
                `32-true` where it has none any more.

        Raises:
            NotFittedError: If the callback has no fit.
            ValueError: If models are not served in that precision.
            RuntimeError: If the model or the tokenizer is not loaded.
        """
        if callback.fitted is None:
            raise NotFittedError("the callback has no fit yet; train with it, or call its fit_posterior")
        if module.model is None:
            raise RuntimeError("the module has no model yet; train it first")
        tokenizer = data.tokenizer
        if isinstance(tokenizer, str):
            raise RuntimeError("the data have no tokenizer yet; train with them, or call their setup")
        if precision is None:
            precision = "32-true" if module._trainer is None else str(module.trainer.precision)
        snapshots = callback.snapshots
        served, methods = ServedModule(module.model), tuple(callback.methods)
        form = QuestionFormat.of_data(data)
        return cls(served, tokenizer, form, callback.fitted, methods, snapshots, precision, described_data(data))

    @property
    def model(self) -> PreTrainedModel:
        """The model of transformers."""
        return self.module.model  # type: ignore[return-value]

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return next(self.module.parameters()).device

    def method(self, name: str | None = None) -> Method:
        """A method by name; None for the default one, the first that was fitted.

        Args:
            name: Name of one of `methods`, or of a registered method that needs no fit and no files.

        Raises:
            ValueError: If there is no method of that name.
        """
        return method_of(self.methods, name)

    def predictor(self, method: str | None = None) -> Predictor:
        """Predicts batches of your own with a method, for `class_logits` of your own.

        Args:
            method: Name of the method; None for the default one.
        """
        return Predictor(self.method(method), self.fitted, self.snapshots)

    def class_logits(self, module: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, None]:
        """Logits `[B, K]` of the choices of a batch of `questions`, in the precision of the fit; and no labels.

        Args:
            module: `module`, or what takes its place in a prediction.
            batch: As of `QuestionFormat.batch`.
        """
        with self.forward_context():
            return self.questions.class_logits(module.model, batch), None

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        """Dtype of automatic mixed precision in which the model runs; None for none."""
        return _AUTOCAST.get(self.precision)

    def forward_context(self) -> AbstractContextManager[Any]:
        """Context within which the model runs in the precision of the fit."""
        dtype = self.autocast_dtype
        return nullcontext() if dtype is None else torch.autocast(self.device.type, dtype)

    def predict(
        self,
        questions: Iterable[Question | Mapping[str, Any]],
        method: str | None = None,
        *,
        batch_size: int = _BATCH_SIZE,
    ) -> ServedPredictions:
        """Predict questions.

        Args:
            questions: Questions, or mappings with `question`, `choices` and maybe `passage` and `id`; see
                `as_questions`.
            method: Name of the method; None for the default one.
            batch_size: Number of questions of a batch.

        Returns:
            Predictions of all questions, in their order.

        Raises:
            ValueError: If there are no questions, one is malformed or does not fit, or the method is unknown.

        Warns:
            TruncationWarning: If questions lost words; see `predict_batches`.
        """
        parts = [found for _, found in self.predict_batches(questions, method, batch_size=batch_size)]
        if not parts:
            raise ValueError("there are no questions to predict; give at least one")
        return ServedPredictions.joined(parts)

    def predict_batches(
        self,
        questions: Iterable[Question | Mapping[str, Any]],
        method: str | None = None,
        *,
        batch_size: int = _BATCH_SIZE,
    ) -> Iterator[tuple[list[Question], ServedPredictions]]:
        """Predict questions batch by batch, as they come; arguments and errors as of `predict`.

        An ensemble takes several batches at a time, since the weights of a member are loaded for all of them.

        Yields:
            The questions of a batch, and their predictions.

        Warns:
            TruncationWarning: Once, at the end, if questions were longer than prompts of the training, and lost words.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
        predictor, remaining = self.predictor(method), as_questions(questions)
        at_a_time = batch_size * (_BATCHES_OF_A_MEMBER if predictor.method.is_ensemble else 1)
        total = cut = 0
        with suppress(GeneratorExit):  # a caller may take some batches only
            while several := list(islice(remaining, at_a_time)):
                groups = [several[begin : begin + batch_size] for begin in range(0, len(several), batch_size)]
                encoded = [self.questions.encoded(self.tokenizer, group) for group in groups]
                total, cut = total + len(several), cut + sum(count for _, count in encoded)
                batches = [self.questions.batch(items, self.device) for items, _ in encoded]
                predicted = predictor.predict_batches(self.module, self.class_logits, batches)
                for group, (log_probs, view) in zip(groups, predicted, strict=True):
                    yield group, ServedPredictions.of(log_probs, predictor.uncertainty(view))
        if cut:  # not after an error, whose place a warning that is one would take
            longest = f"the {self.questions.max_length} tokens of prompts that the model was fine-tuned with"
            message = f"{cut} of {total} questions were longer than {longest}; {TRUNCATED}"
            warnings.warn(message, TruncationWarning, stacklevel=2)

    def prediction_sets(
        self,
        questions: Iterable[Question | Mapping[str, Any]],
        method: str | None = None,
        *,
        coverage: float = 0.9,
        score: ConformalScore = "lac",
        batch_size: int = _BATCH_SIZE,
    ) -> PredictionSets:
        """Sets of choices that contain the right one at a chosen rate, from labelled questions (split conformal).

        The rate holds for questions that are exchangeable with these: of the same kind, and neither trained on nor
        used to fit a method.

        Args:
            questions: Questions, or mappings with `answer`; see `labelled_questions`.
            method: Name of the method; None for the default one.
            coverage: Probability in (0, 1) with which a set should contain the right choice.
            score: Score of a choice; see `PredictionSets`.
            batch_size: Number of questions of a batch.

        Returns:
            What gives the sets of `ServedPredictions.log_probs`.

        Raises:
            ValueError: As `predict`, if a question has no answer, there are too few for the coverage (see
                `check_num_labels`), or a setting is not supported.
        """
        from bmoe_lightning.metrics import PredictionSets
        from bmoe_lightning.metrics.conformal import check_num_labels

        labelled = list(labelled_questions(questions))
        check_num_labels(len(labelled), coverage)
        found = self.predict(labelled, method, batch_size=batch_size)
        answers = torch.tensor([question.answer for question in labelled])
        return PredictionSets.fit(found.log_probs, answers, coverage=coverage, score=score)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write model, tokenizer, fit, files of methods and a model card into one folder, under a temporary name first.

        Args:
            folder: Folder, missing or empty.

        Raises:
            ValueError: If the model has adapters, or the folder has other content.
            OSError: If it cannot be written.
        """
        from bmoe_lightning.serving.saving import save

        save(self, Path(folder))


def method_of(methods: Sequence[Method], name: str | None) -> Method:
    """A method of a served model by name; see `CalibratedModel.method`.

    Args:
        methods: The methods of the model, at least one.
        name: Name of one of them, or of a registered method that needs no fit and no files; None for the default one.

    Raises:
        ValueError: If there is no method of that name.
    """
    found = {method.name: method for method in methods}
    if name is None:
        return next((method for method in methods if method.is_fitted_method), methods[0])
    if name in found:
        return found[name]
    unfitted = get_method(name) if name in method_names() else None
    if unfitted is None or unfitted.is_fitted_method or unfitted.is_ensemble:
        raise ValueError(f"this model has no method {name!r}; it has {', '.join(found)}")
    return unfitted


def described_data(data: MultipleChoiceDataModule, name: str | None = None) -> tuple[str, ...]:
    """Sentences on what the methods were fitted and tested on.

    Args:
        data: DataModule that has been set up.
        name: What the questions are called; by default the folder or hub id that they were loaded from.
    """
    parts: tuple[Part, ...] = ("train", "calibration", "test")
    numbers = {part: len(data.questions(part)) for part in parts}
    if name is None:
        name = data.data if isinstance(data.data, str) else "a data set that was given in memory"
    if Path(name).exists():  # a path on this machine says nothing elsewhere
        name = Path(name).resolve().name
    return (
        f"Trained on {numbers['train']} questions of {name}, with the prompt format {data.prompt_format.name!r}.",
        f"Prior precisions and temperatures were fitted on {numbers['calibration']} held-out questions.",
        f"Tested on {numbers['test']} further ones.",
    )
