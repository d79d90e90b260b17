"""The file by which a folder is served: where model, fit and methods are, and what they were made with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bmoe_lightning.serving.question_format import QuestionFormat
from bmoe_lightning.utils.file_header import damaged
from bmoe_lightning.utils.json_io import read_json_file, write_json_file

MANIFEST_FILE = "calibrated_model.json"
_FORMAT, _VERSION = "calibrated model", 1
_REMEDY = "save the model again, or run the command that made it again"


def check_precision(precision: str) -> None:
    """Check that models are served in a precision.

    Args:
        precision: Lightning's name.

    Raises:
        ValueError: If they are not.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"models are served in the precisions {', '.join(PRECISIONS)}, and not in {precision!r}")


PRECISIONS = ("32-true", "64-true", "bf16-true", "16-true", "bf16-mixed", "16-mixed")
"""Lightning's names of the precisions that a model can be served in."""


@dataclass(frozen=True)
class LoRAShape:
    """The adapters that trained weights are of; see `LoRAFinetuner`.

    Attributes:
        rank: Rank of the updates.
        alpha: Scale of the updates.
        target_modules: Names of the adapted layers.
        dropout: Probability of dropout in training, which methods may predict with.
    """

    rank: int
    alpha: float
    target_modules: tuple[str, ...]
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if type(self.rank) is not int or self.rank < 1:
            raise ValueError(f"rank must be a positive integer, got {self.rank!r}")
        for name, value in (("alpha", self.alpha), ("dropout", self.dropout)):
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{name} must be a number, got {value!r}")
        if not self.target_modules or not all(map(_is_path, self.target_modules)):
            raise TypeError(f"target_modules must be names, got {self.target_modules!r}")


@dataclass(frozen=True)
class Manifest:
    """What a served model consists of. Paths are relative to the folder of the file, or absolute.

    Attributes:
        model: Folder or hub id of the model in the format of transformers.
        tokenizer: Folder or hub id of its tokenizer.
        fit: Folder of the fit.
        questions: How questions are asked.
        methods: Methods as of `method_entry`.
        weights: Snapshot of trained weights that are put into the model; None if its files have them.
        precision: Lightning's name of the precision of predictions.
        lora: Adapters that the weights are of; None for none.
        data: Sentences on what it was trained, fitted and tested on.
        results: Rows of its table on the test questions, for the model card: values by column.
        sha256: Digests of files of the folder, by relative path, for one that holds all of the model: its paths do not
            leave it then. None for the folder of a run, whose files have their own.
        model_sha256: Digests of the model's files of `CONFIG_FILES` as they were for the fit, by name. None for a
            folder that holds all of the model, and for one that an earlier release has written.
        tokenizer_sha256: Those of the tokenizer's files, by name, likewise.
    """

    model: str
    tokenizer: str
    fit: str
    questions: QuestionFormat
    methods: tuple[Mapping[str, Any], ...]
    weights: str | None = None
    precision: str = "32-true"
    lora: LoRAShape | None = None
    data: tuple[str, ...] = ()
    results: tuple[Mapping[str, Any], ...] = ()
    sha256: Mapping[str, str] = field(default_factory=dict)
    model_sha256: Mapping[str, str] = field(default_factory=dict)
    tokenizer_sha256: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("model", "tokenizer", "fit"):
            if not _is_path(getattr(self, name)):
                raise TypeError(f"{name} must be a path, got {getattr(self, name)!r}")
        if self.weights is not None and not _is_path(self.weights):
            raise TypeError(f"weights must be a path or None, got {self.weights!r}")
        for name in ("methods", "results"):
            if not all(isinstance(entry, Mapping) for entry in getattr(self, name)):
                raise TypeError(f"{name} must be mappings, got {getattr(self, name)!r}")
        if not all(isinstance(sentence, str) for sentence in self.data):
            raise TypeError(f"data must be sentences, got {self.data!r}")
        for name in ("sha256", "model_sha256", "tokenizer_sha256"):
            digests = getattr(self, name)
            if not all(_is_path(path) and isinstance(digest, str) for path, digest in digests.items()):
                raise TypeError(f"{name} must have a digest for each path, got {digests!r}")
        check_precision(self.precision)
        if not self.methods:
            raise ValueError("there are no methods")

    def write(self, folder: Path) -> None:
        """Write the file atomically.

        Args:
            folder: Its folder; created if missing.

        Raises:
            OSError: If it cannot be written.
        """
        content = {**asdict(self), "questions": self.questions.description()}
        write_json_file(folder / MANIFEST_FILE, format=_FORMAT, version=_VERSION, description=content)

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read the file of a folder.

        Args:
            folder: The folder.

        Raises:
            FileNotFoundError: If it has none.
            ValueError: If the file is damaged, foreign or of another version.
        """
        path = folder / MANIFEST_FILE
        content = read_json_file(path, format=_FORMAT, version=_VERSION, remedy=_REMEDY).description
        try:
            lora = content.get("lora")
            lists = {name: _list(content.get(name, [])) for name in ("methods", "data", "results")}
            objects = {
                "questions": QuestionFormat.from_description(content["questions"]),
                "lora": None
                if lora is None
                else LoRAShape(**{**lora, "target_modules": _list(lora["target_modules"])}),
            }
            return cls(**{**content, **lists, **objects})
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise damaged(path, _FORMAT, f"it is incomplete ({error})", _REMEDY) from error


def place(folder: Path, path: str) -> str:
    """A folder or hub id of a manifest as seen from here: a folder if it is there, or can be no hub id.

    Args:
        folder: Folder of the manifest.
        path: The folder as seen from there, or a hub id.
    """
    below = folder / path
    return str(below) if below.exists() or path.startswith((".", "/")) else path


def _is_path(value: object) -> bool:
    return isinstance(value, str) and bool(value) and "\0" not in value


def _list(value: object) -> tuple[Any, ...]:
    if not isinstance(value, list):
        raise TypeError(f"a list is expected, got {value!r}")
    return tuple(value)
