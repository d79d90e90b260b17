"""Settings of a recipe: one dataclass, from which the command line, the YAML file and `--help` are made.

Nothing heavy is imported here, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import math
import types
import typing
from collections.abc import Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import Any

ALL_METHODS = (
    "map,mc_dropout,checkpoint_ensemble,deep_ensemble,temperature,laplace_evidence,laplace_lpo,laplace_temperature,"
    "evidence_temperature,shrunk_temperature"
)


class SettingsError(ValueError):
    """A setting is unknown or has no possible value; the message says which and what to do."""


def _setting(default: Any, help_text: str) -> Any:
    return field(default=default, metadata={"help": help_text})


@dataclass(frozen=True)
class Settings:
    """What `python -m recipes.qwen_obqa` does; None means: as the kind of run suggests (see `resolved`)."""

    model: str | None = _setting(
        None, "hub id or local folder of a mixture-of-experts causal LM; left out: a small one is made"
    )
    data: str | None = _setting(
        None,
        "hub id (allenai/openbookqa, allenai/ai2_arc:ARC-Easy) or folder with train.jsonl and test.jsonl (or parquet) "
        "in the hub's columns; left out: the built-in generated task, or allenai/openbookqa if --model is given",
    )
    output_dir: str = _setting("runs/qwen_obqa", "everything is written below this folder")
    methods: str = _setting(ALL_METHODS, "comma-separated methods to compare")
    seeds: int = _setting(1, "how many fine-tuning seeds; the table then has their mean and standard deviation")
    first_seed: int = _setting(0, "the first of these seeds")
    limit: int | None = _setting(None, "use at most this many questions of each split")
    resume: bool = _setting(
        False, "go on with an interrupted run: finished stages are not done again (the same settings do so anyway)"
    )
    overwrite: bool = _setting(False, "start anew where an earlier run is, and remove its files")
    dry_run: bool = _setting(
        False,
        "few questions, two epochs; the small model has random weights: checks that everything runs, within a minute "
        "without --model",
    )
    quiet: bool = _setting(False, "no progress bars")
    epochs: int | None = _setting(None, "fine-tuning epochs")
    batch_size: int | None = _setting(None, "fine-tuning batch size")
    eval_batch_size: int | None = _setting(None, "batch size of curvature and prediction")
    learning_rate: float | None = _setting(None, "peak learning rate of AdamW")
    weight_decay: float = _setting(0.0, "of AdamW")
    schedule: str = _setting("linear", "linear, cosine or constant learning rate")
    train: str = _setting("experts", "what is fine-tuned: experts (all weights of the experts) or down_proj")
    expert_dropout: float | None = _setting(None, "dropout inside the experts while fine-tuning, and of MC dropout")
    max_length: int = _setting(256, "longest prompt in tokens")
    prompt: str | None = _setting(None, "prompt format: instruction or letters (default: what the model knows)")
    rank: int | None = _setting(None, "eigenpairs kept of each Kronecker factor")
    fisher: str = _setting("exact", "labels of the curvature: exact, mc or empirical")
    sketch: str = _setting("auto", "low-rank algorithm: auto, nystrom, rsvd or exact")
    curvature_checkpoint_every: int = _setting(
        100, "write the sums of the curvature pass every so many batches; a killed pass goes on from there"
    )
    link: str = _setting("mc", "from logits to probabilities: mc, isotropic, probit or laplace_bridge")
    num_samples: int = _setting(10_000, "Monte Carlo samples of a prediction")
    ensemble_size: int = _setting(3, "members of the deep ensemble; each is a fine-tuning run of its own")
    num_snapshots: int = _setting(5, "members of the checkpoint ensemble")
    accelerator: str = _setting("auto", "auto, cpu or gpu")
    strategy: str = _setting(
        "auto",
        "with several processes, which torchrun starts: auto (DDP, each holds the model) or sharded (FSDP2, together)",
    )
    precision: str | None = _setting(None, "Lightning precision, such as 32-true or bf16-true")

    @property
    def kind(self) -> str:
        """`builtin` (small model, generated task), `small` (small model, real data) or `full` (a given model)."""
        if self.model is not None:
            return "full"
        return "builtin" if self.data is None else "small"

    @property
    def method_names(self) -> tuple[str, ...]:
        """The methods as a tuple."""
        return tuple(name.strip() for name in self.methods.split(",") if name.strip())

    def resolved(self) -> ResolvedSettings:
        """Fill in what was left open: the paper's hyper-parameters for a real model, gentle ones for the small one.

        Raises:
            SettingsError: if a value is out of range.
        """
        if self.kind == "full":
            # Table 8 of the paper.
            chosen = {
                "epochs": 3,
                "batch_size": 8,
                "eval_batch_size": 8,
                "learning_rate": 5e-5,
                "expert_dropout": 0.1,
                "rank": 10,
                "prompt": "instruction",
                "precision": "bf16-true",
            }
        else:
            chosen = {**SMALL_MODEL_DEFAULTS[self.kind], "precision": "32-true"}
        if self.dry_run:
            chosen |= {"epochs": 2}
        missing: dict[str, Any] = {name: value for name, value in chosen.items() if getattr(self, name) is None}
        data = "allenai/openbookqa" if self.data is None and self.model is not None else self.data
        settings = ResolvedSettings(**{**vars(self), **missing, "data": data})
        settings.check()
        return settings

    def check(self) -> None:
        """Refuse values that could only fail later.

        Raises:
            SettingsError: naming the setting.
        """
        self._check_methods()
        counts = ("seeds", "rank", "num_samples", "epochs", "batch_size", "eval_batch_size", "max_length")
        for name in (*counts, "curvature_checkpoint_every"):
            value = getattr(self, name)
            if value < 1:
                raise SettingsError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
        if self.limit is not None and self.limit < 1:
            raise SettingsError(f"--limit must be at least 1, got {self.limit}")
        if self.first_seed < 0:
            raise SettingsError(f"--first-seed must be at least 0, got {self.first_seed}")
        if self.resume and self.overwrite:
            raise SettingsError("--resume goes on with a run and --overwrite removes it; give one of the two")
        choices = {
            "train": ("experts", "down_proj"),
            "schedule": ("linear", "cosine", "constant"),
            "fisher": ("exact", "mc", "empirical"),
            "sketch": ("auto", "nystrom", "rsvd", "exact"),
            "link": ("mc", "isotropic", "probit", "laplace_bridge"),
            "prompt": ("instruction", "letters"),
            "strategy": ("auto", "sharded"),
        }
        for name, valid in choices.items():
            if getattr(self, name) not in valid:
                raise SettingsError(f"--{name} must be one of {', '.join(valid)}, got {getattr(self, name)!r}")
        self._check_rates()
        self._check_needs_of_methods()

    def _check_methods(self) -> None:
        known = ALL_METHODS.split(",")
        for name in self.method_names:
            if name not in known:
                raise SettingsError(f"unknown method {name!r}{_nearest(name, known)}; there are {', '.join(known)}")
            if self.method_names.count(name) > 1:
                raise SettingsError(f"--methods names {name} more than once")
        if not self.method_names:
            raise SettingsError("--methods names no method")

    def _check_rates(self) -> None:
        learning_rate, dropout = self.learning_rate, self.expert_dropout
        assert learning_rate is not None
        assert dropout is not None
        if not 0 < learning_rate < math.inf:
            raise SettingsError(f"--learning-rate must be a number above 0, got {learning_rate}")
        if not 0 <= self.weight_decay < math.inf:
            raise SettingsError(f"--weight-decay must be a number of at least 0, got {self.weight_decay}")
        if not 0 <= dropout < 1:
            raise SettingsError(f"--expert-dropout must be at least 0 and below 1, got {dropout}")

    def _check_needs_of_methods(self) -> None:
        """Refuse values that only some methods cannot use, with the way out of leaving these methods out."""
        assert self.epochs is not None
        needs = (
            ("deep_ensemble", self.ensemble_size < 2, f"--ensemble-size of at least 2, got {self.ensemble_size}"),
            ("checkpoint_ensemble", self.num_snapshots < 2, f"--num-snapshots of at least 2, got {self.num_snapshots}"),
            ("checkpoint_ensemble", self.epochs < 2, f"--epochs of at least 2, got {self.epochs}"),
            ("mc_dropout", self.expert_dropout == 0, f"--expert-dropout above 0, got {self.expert_dropout}"),
            ("evidence_temperature", self.fisher != "exact", f"--fisher exact, got {self.fisher}"),
            ("shrunk_temperature", self.fisher != "exact", f"--fisher exact, got {self.fisher}"),
        )
        unmet = [(name, what) for name, lacking, what in needs if lacking and name in self.method_names]
        if unmet:
            what = unmet[0][1]
            names = [name for name, same in unmet if same == what]
            verb, them = ("needs", "it") if len(names) == 1 else ("need", "these two")
            raise SettingsError(f"{' and '.join(names)} {verb} {what}; or leave {them} out of --methods")


@dataclass(frozen=True)
class ResolvedSettings(Settings):
    """Settings in which nothing is left open; made by `Settings.resolved`."""

    epochs: int = 0
    batch_size: int = 0
    eval_batch_size: int = 0
    learning_rate: float = 0.0
    expert_dropout: float = 0.0
    rank: int = 0
    prompt: str = ""
    precision: str = ""


SMALL_MODEL_DEFAULTS: dict[str, dict[str, Any]] = {
    "builtin": {
        "epochs": 44,
        "batch_size": 32,
        "eval_batch_size": 64,
        "learning_rate": 6e-4,
        "expert_dropout": 0.2,
        "rank": 32,
        "prompt": "letters",  # the only format that the built-in model has read
    },
    "small": {
        "epochs": 3,
        "batch_size": 32,
        "eval_batch_size": 32,
        "learning_rate": 6e-4,
        "expert_dropout": 0.2,
        "rank": 32,
        "prompt": "instruction",
    },
}


def parse_settings(arguments: Sequence[str], *, program: str, description: str) -> Settings:
    """Read settings from the command line: defaults, then `--config FILE`, then flags.

    Args:
        arguments: without the program's name.
        program: as `--help` names it.
        description: for `--help`.

    Raises:
        SettingsError: for an unknown or impossible entry of the file.
        SystemExit: for `--help` (0) and unknown flags (2).
    """
    parser = _parser(program, description)
    flags = vars(parser.parse_args(arguments))
    config = flags.pop("config", None)
    values = {**(_read_config(Path(config)) if config else {}), **flags}
    return Settings(**values)


def _parser(program: str, description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=program,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file with any of these settings; flags win over it")
    for entry in fields(Settings):
        flag, kind = "--" + entry.name.replace("_", "-"), _kind(entry)
        text = entry.metadata["help"]
        if kind is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, help=text)
            continue
        shown = "all" if entry.name == "methods" else entry.default
        default = "" if entry.default is None else f" (default: {shown})"
        parser.add_argument(flag, type=kind, metavar=kind.__name__.upper(), help=(text + default).replace("%", "%%"))
    return parser


def _kind(entry: Field[Any]) -> type:
    """The one type of a setting, `None` aside."""
    hint = typing.get_type_hints(Settings)[entry.name]
    if isinstance(hint, types.UnionType):
        (hint,) = (part for part in typing.get_args(hint) if part is not type(None))
    assert entry.default is not MISSING
    assert isinstance(hint, type)
    return hint


def _read_config(path: Path) -> dict[str, Any]:
    import yaml

    if not path.is_file():
        raise SettingsError(f"there is no config file {path}")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise SettingsError(f"{path} is no YAML: {error}") from None
    if not isinstance(content, dict):
        raise SettingsError(f"{path} must hold settings as `name: value`, found a {type(content).__name__}")
    entries = {entry.name: entry for entry in fields(Settings)}
    values = {}
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name not in entries:
            raise SettingsError(f"{path}: unknown setting {key!r}{_nearest(name, entries)}")
        values[name] = _converted(path, entries[name], value)
    return values


def _converted(path: Path, entry: Field[Any], value: Any) -> Any:
    """A YAML value in the setting's type; YAML reads 5e-5 as text."""
    if value is None and entry.default is None:
        return None
    kind = _kind(entry)
    if entry.name == "methods" and isinstance(value, list):
        value = ",".join(map(str, value))
    if kind is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        with contextlib.suppress(ValueError):
            value = float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise SettingsError(f"{path}: {entry.name} must be of type {kind.__name__}, got {value!r}")
    return value


def _nearest(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f", did you mean {close[0]!r}?" if close else ""
