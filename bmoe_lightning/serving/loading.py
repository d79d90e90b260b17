"""Read a served model: the parts that a manifest names, or those that the caller names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bmoe_lightning.methods.base import Method
from bmoe_lightning.methods.fit_result import FitResult
from bmoe_lightning.methods.snapshots import apply_snapshot
from bmoe_lightning.models.buffers import unrounded_buffers
from bmoe_lightning.models.loading import load_causal_model, load_tokenizer
from bmoe_lightning.models.model_files import CONFIG_FILES, TOKENIZER_FILES, FileChange, changed_files
from bmoe_lightning.serving.manifest import MANIFEST_FILE, LoRAShape, Manifest, check_precision, place
from bmoe_lightning.serving.method_entries import methods_of_entries, paths_of, with_paths
from bmoe_lightning.serving.question_format import QuestionFormat, ServedModule
from bmoe_lightning.utils.checkpoint_io import STATE_DICT, read_checkpoint
from bmoe_lightning.utils.file_digest import digest_of
from bmoe_lightning.utils.file_header import DamagedFileError
from bmoe_lightning.utils.late_import import how_to_install
from bmoe_lightning.utils.messages import first_names

_DTYPES = {"64-true": torch.float64, "bf16-true": torch.bfloat16, "16-true": torch.float16}
_SEED_FOLDERS = "seed-*"


@dataclass(frozen=True)
class Served:
    """The parts of a served model.

    Attributes:
        model: Folder or hub id of the model.
        tokenizer: Folder or hub id of its tokenizer.
        fit: Folder of the fit.
        questions: How questions are asked.
        methods: The methods that are wanted; none for those of the fit.
        weights: Fine-tuned weights, a snapshot or a checkpoint of Lightning; None if the model's files have them.
        precision: Lightning's name of the precision.
        lora: Adapters that the weights are of; None for none.
        data: Sentences on its data.
        results: Rows of its table.
        model_sha256: Digests of the model's configuration as it was for the fit; none if they are not known.
        tokenizer_sha256: Those of the tokenizer's files.
    """

    model: str
    tokenizer: str
    fit: Path
    questions: QuestionFormat
    methods: tuple[Method, ...] = ()
    weights: Path | None = None
    precision: str = "32-true"
    lora: LoRAShape | None = None
    data: tuple[str, ...] = ()
    results: tuple[Mapping[str, Any], ...] = ()
    model_sha256: Mapping[str, str] = field(default_factory=dict)
    tokenizer_sha256: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of_model(
        cls, model: str, fit: Path, questions: QuestionFormat, weights: str | Path | None, precision: str
    ) -> Served:
        """The parts that a caller names.

        Args:
            model: Folder or hub id of the model, and of its tokenizer.
            fit: Folder of the fit.
            questions: How questions are asked.
            weights: Fine-tuned weights.
            precision: Lightning's name of the precision.

        Raises:
            ValueError: If models are not served in that precision.
        """
        check_precision(precision)
        of_file = None if weights is None else Path(weights)
        return cls(model, model, fit, questions, weights=of_file, precision=precision)


def load_served(folder: Path, wanted: Sequence[str | Method] = (), *, verify: bool = True) -> Served | None:
    """The parts of the model in a folder; None if it is a model of transformers, or no folder.

    Args:
        folder: Folder with a manifest, or of a run with one seed.
        wanted: Names of the methods that are wanted, and methods that need no description; none for all.
        verify: Whether to compare the files of a saved folder with their digests.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file is damaged, or the folder has the runs of several seeds.
    """
    if not (folder / MANIFEST_FILE).is_file():
        found = sorted(path.parent for path in folder.glob(f"{_SEED_FOLDERS}/{MANIFEST_FILE}"))
        if len(found) > 1:
            raise ValueError(f"{folder} has {len(found)} fine-tuned models; name one of {', '.join(map(str, found))}")
        return load_served(found[0], wanted, verify=verify) if found else None
    manifest = Manifest.read(folder)
    methods = methods_of_entries(manifest.methods, wanted)
    if manifest.sha256:
        _check_inside(folder, manifest, methods)
        if verify:
            _verify(folder, manifest.sha256)
    model, tokenizer = (
        str(folder / name) if manifest.sha256 else place(folder, name) for name in (manifest.model, manifest.tokenizer)
    )
    return Served(
        model=model,
        tokenizer=tokenizer,
        fit=folder / manifest.fit,
        questions=manifest.questions,
        methods=tuple(_placed(folder, method) for method in methods),
        weights=None if manifest.weights is None else folder / manifest.weights,
        precision=manifest.precision,
        lora=manifest.lora,
        data=manifest.data,
        results=manifest.results,
        model_sha256=manifest.model_sha256,
        tokenizer_sha256=manifest.tokenizer_sha256,
    )


def check_model_files(served: Served) -> None:
    """Compare the model's configuration and its tokenizer with those of the fit, where these are known.

    Args:
        served: The parts.

    Raises:
        FileNotFoundError: If a file is missing.
        ModelUnavailableError: If the model is.
        ValueError: If a file was changed, or was added.
    """
    remedy = (
        "restore what the methods were fitted with, or pass verify=False to CalibratedModel.from_pretrained if you "
        "know that predictions do not depend on it"
    )
    for source, fitted, names in (
        (served.model, served.model_sha256, CONFIG_FILES),
        (served.tokenizer, served.tokenizer_sha256, TOKENIZER_FILES),
    ):
        for name, change in changed_files(source, fitted, names).items() if fitted else ():
            where = Path(source) / name if Path(source).is_dir() else f"{name} of {source}"
            if change is FileChange.CHANGED:
                raise DamagedFileError(f"{where} is not the file of the fit: it was changed since; {remedy}")
            if change is FileChange.ADDED:
                raise DamagedFileError(f"{where} was added after the fit; {remedy}")
            raise FileNotFoundError(f"{where} is {change.value}, which was there for the fit; {remedy}")


def read_model(served: Served) -> tuple[ServedModule, PreTrainedTokenizerBase]:
    """The model with its fine-tuned weights, on the CPU in evaluation mode, and its tokenizer.

    Args:
        served: The parts.

    Raises:
        ModelUnavailableError: If the model cannot be loaded.
        FileNotFoundError: If the weights are missing.
        ValueError: If the weights are damaged, or are not those of this model.
    """
    model: Any = load_causal_model(served.model)
    if served.lora is not None:
        add_adapters(model, served.lora)
    dtype = _DTYPES.get(served.precision)
    if dtype is not None:
        with unrounded_buffers(model):
            model.to(dtype)
    if model.dtype == torch.float64:  # grouped kernels do not support it
        model.set_experts_implementation("eager")
    module = ServedModule(model)
    module.requires_grad_(False)
    if served.weights is not None:
        _load_weights(module, served.weights)
    return module.eval(), load_tokenizer(served.tokenizer)


def add_adapters(model: PreTrainedModel, shape: LoRAShape) -> None:
    """Add adapters of PEFT to a model, whose values do not matter yet.

    Args:
        model: Model without adapters.
        shape: What adapters.

    Raises:
        ImportError: If PEFT is not installed.
    """
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ImportError(
            f"this model was fine-tuned with LoRA, and PEFT is not installed; {how_to_install('lora')}"
        ) from error
    rank: dict[str, Any] = {"r": shape.rank, "lora_alpha": shape.alpha, "lora_dropout": shape.dropout}
    model.add_adapter(LoraConfig(**rank, target_modules=list(shape.target_modules)))


def fitted_methods(fitted: FitResult, wanted: Sequence[str | Method] = ()) -> list[Method]:
    """The methods of a fit, with the options that they were fitted with and defaults of the others.

    Args:
        fitted: Result of the fit.
        wanted: Names of the methods that are wanted, and methods that need no description; none for all.
    """
    entries = [{**found.options, "name": name} for name, found in fitted.methods.items()]
    return methods_of_entries(entries, wanted)


def _check_inside(folder: Path, manifest: Manifest, methods: Sequence[Method]) -> None:
    """Refuse a saved folder, which holds all of its model, whose manifest names a file outside of it."""
    named = [manifest.model, manifest.tokenizer, manifest.fit, *manifest.sha256]
    named += [] if manifest.weights is None else [manifest.weights]
    named += [str(path) for method in methods for found in paths_of(method).values() for path in found]
    for name in named:
        path = PurePath(name)
        if path.is_absolute() or ".." in path.parts:
            raise DamagedFileError(
                f"{folder / MANIFEST_FILE} names {name!r}, which is not in its folder; copy or download the whole "
                "folder again, or save the model again"
            )


def _verify(folder: Path, digests: Mapping[str, str]) -> None:
    for name, digest in digests.items():
        path = folder / name
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing; copy or download the whole folder again")
        if digest_of(path) != digest:
            raise DamagedFileError(f"{path} is damaged or was changed; copy or download the folder again")


def _placed(folder: Path, method: Method) -> Method:
    """The method with the files of further runs as seen from here."""
    paths = {name: [folder / path for path in found] for name, found in paths_of(method).items()}
    for path in (path for found in paths.values() for path in found):
        if not path.exists():
            raise FileNotFoundError(
                f"{path} is missing, which {method.name} predicts with; copy the whole output folder, or leave the "
                "method out with methods="
            )
    return with_paths(method, paths)


def _load_weights(module: ServedModule, path: Path) -> None:
    if path.suffix == ".ckpt":
        _load_checkpoint(module, path)
    else:
        apply_snapshot(module, path)


def _load_checkpoint(module: ServedModule, path: Path) -> None:
    """Load the state dict of a Lightning checkpoint."""
    if path.is_dir():
        raise ValueError(
            f"{path} is a sharded checkpoint; consolidate it first with python -m "
            "lightning.pytorch.utilities.consolidate_checkpoint"
        )
    state = read_checkpoint(path, remedy="save its weights again")[STATE_DICT]
    if not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"the state_dict of {path} has other values than tensors; save its weights again")
    expected = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    wrong = [name for name, value in state.items() if expected.get(name) != tuple(value.shape)]
    if wrong or not state:
        raise ValueError(
            f"{path} has {len(wrong)} of {len(state)} tensors that the model has not, or in another shape: "
            f"{first_names(wrong)}. Give the checkpoint of a module that holds this model as `model`."
        )
    module.load_state_dict(state, strict=False)
