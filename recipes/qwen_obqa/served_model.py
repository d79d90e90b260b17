"""What a finished run is served by: the file that says where its model, weights and fit are."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from bmoe_lightning import LoRAFinetuner, MultipleChoiceDataModule
from bmoe_lightning.base_finetuner import Finetuner
from bmoe_lightning.methods import Method
from bmoe_lightning.metrics import calibration_values
from bmoe_lightning.models.model_files import CONFIG_FILES, TOKENIZER_FILES, file_digests, tokenizer_files
from bmoe_lightning.report import MethodResult
from bmoe_lightning.serving import Manifest, QuestionFormat, method_entry
from bmoe_lightning.serving.calibrated_model import described_data
from bmoe_lightning.serving.manifest import MANIFEST_FILE, PRECISIONS, LoRAShape
from bmoe_lightning.serving.method_entries import FITS, RUNS, paths_of, with_paths
from recipes.qwen_obqa.run_folder import FIT_FOLDER, files_at_start
from recipes.qwen_obqa.seed_training import SeedTraining

_METRICS = ("acc", "ece", "nll")


def write_manifest(
    training: SeedTraining,
    module: Finetuner,
    methods: Sequence[Method],
    data: MultipleChoiceDataModule,
    results: Sequence[MethodResult],
) -> None:
    """Write the manifest of a seed, by which `CalibratedModel.from_pretrained` loads its folder.

    Nothing is written for a precision in which models are not served. On rank zero alone, so no collective runs.

    Args:
        training: The seed's trainings.
        module: The module of the run.
        methods: Methods with the files of their further runs.
        data: DataModule of the run, which a trainer has used.
        results: Predictions of the test questions.
    """
    settings, folder = training.settings, training.folder
    if settings.precision not in PRECISIONS:
        return
    lora = None
    if settings.train == "lora":
        assert isinstance(module, LoRAFinetuner)
        lora = LoRAShape(module.rank, module.alpha, tuple(module.target_modules), module.dropout)
    name = settings.data or "the built-in task"
    values = {result.method: calibration_values(result.log_probs, result.target) for result in results}
    assert not isinstance(data.tokenizer, str)
    model, tokenizer = training.source.model_of(training.seed), training.source.tokenizer
    model_sha256, tokenizer_sha256 = fitted_digests(training, data.tokenizer)
    Manifest(
        model=_relative(model, folder),
        tokenizer=_relative(tokenizer, folder),
        fit=FIT_FOLDER,
        questions=QuestionFormat.of_data(data),
        methods=tuple(method_entry(_relative_paths(method, folder)) for method in methods),
        weights=training.weights(0).name,
        precision=settings.precision,
        lora=lora,
        data=described_data(data, name),
        results=tuple(
            {"method": result.label, **{metric: float(values[result.method][metric]) for metric in _METRICS}}
            for result in results
        ),
        model_sha256=model_sha256,
        tokenizer_sha256=tokenizer_sha256,
    ).write(folder)


def fitted_digests(training: SeedTraining, tokenizer: PreTrainedTokenizerBase) -> tuple[dict[str, str], dict[str, str]]:
    """Digests of the configuration of a seed's model, and of the files of its tokenizer, as the seed has started with.

    They are those of now for a small model, whose folder has a record of its own, and for files that only the class of
    the tokenizer reads.

    Args:
        training: The seed's trainings.
        tokenizer: The tokenizer.
    """
    model, named = training.source.model_of(training.seed), training.source.tokenizer
    started = files_at_start(training.output, training.seed)
    if started is None:
        return file_digests(model, CONFIG_FILES), file_digests(named, tokenizer_files(tokenizer))
    of_class = [name for name in tokenizer_files(tokenizer) if name not in TOKENIZER_FILES]
    return {name: started[name] for name in CONFIG_FILES if name in started}, {
        **file_digests(named, of_class),
        **started,
    }


def lacks_manifest(training: SeedTraining) -> bool:
    """Whether a seed should have a manifest and has none: one that was killed, or finished by an earlier version.

    Args:
        training: The seed's trainings.
    """
    return training.settings.precision in PRECISIONS and not (training.folder / MANIFEST_FILE).is_file()


def _relative(path: str, folder: Path) -> str:
    """A local path as seen from the folder of a seed, so that the output folder can be moved; others unchanged."""
    return os.path.relpath(path, folder) if Path(path).exists() else path


def _relative_paths(method: Method, folder: Path) -> Method:
    found = paths_of(method)
    return with_paths(
        method, {name: [Path(_relative(str(path), folder)) for path in found[name]] for name in (RUNS, FITS)}
    )
