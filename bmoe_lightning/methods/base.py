"""The shape of every method: options, what it needs, how it is fitted, how it predicts.

A method is a frozen dataclass whose fields are its options. `fit` turns what the workbench offers into a state, a few
tensors on the CPU; `log_probs` is a pure function of a batch and that state. A method with several members (an
ensemble) prepares the model for each in a context manager; members are looped over outside, batches inside, so that
weights are loaded once a member and not once a batch.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor, nn

from bmoe_lightning.curvature.spec import Curvature, LayerSelection
from bmoe_lightning.methods.needs import Needs

if TYPE_CHECKING:
    from bmoe_lightning.methods.batch_view import BatchView
    from bmoe_lightning.methods.workbench import Workbench

State = Mapping[str, Tensor]
"""What was fitted: tensors on the CPU by name, small unless the method says so."""

PRIOR_PRECISION = "prior_precision"
"""Key of the states of Laplace methods: `[L]`, one value a layer. What is served without Lightning looks for it."""

_PREDICTION_ONLY = "prediction_only"
_LONGEST_VECTOR = 1000
_NAME = re.compile(r"[a-z][a-z0-9_]*")


def option(default: Any, help: str, *, prediction_only: bool = False) -> Any:
    """A field of a method: its default, and a sentence for help and docs.

    Args:
        default: Default value.
        help: One sentence.
        prediction_only: Whether the option matters for prediction alone, so that a fit made with another value serves.
    """
    return field(default=default, metadata={"help": help, _PREDICTION_ONLY: prediction_only})


@dataclass(frozen=True)
class Method(ABC):
    """A way to predict class probabilities.

    Attributes:
        name: Identifier in tables, logged names and files.
        label: Name for people.
    """

    name: str = field(metadata={"help": "Identifier in tables, logged names and files."})
    label: str = field(metadata={"help": "Name for people."})

    source: ClassVar[str] = ""
    """URL of the paper or of the documentation page that the method is from."""

    cost: ClassVar[str] = "one forward pass"
    """What a prediction costs, for the table of methods."""

    @property
    def needs(self) -> Needs:
        """What must be there besides the model."""
        return Needs()

    @property
    def curvatures(self) -> tuple[Curvature, ...]:
        """Curvatures that the fit or predictions look at."""
        given = getattr(self, "curvature", None)
        return () if given is None else (given,)

    @property
    def prediction_curvatures(self) -> tuple[Curvature, ...]:
        """Those of `curvatures` that predictions look at; all of them, unless the fit alone needs some."""
        return self.curvatures

    @property
    def is_ensemble(self) -> bool:
        """Whether the model has to be prepared for each of several members."""
        return type(self).members is not Method.members

    @property
    def is_fitted_method(self) -> bool:
        """Whether there is anything to fit."""
        return type(self).fit is not Method.fit

    def fit(self, work: Workbench) -> State:
        """Fit the method; called on every rank alike, and rank 0's result is used on all.

        Args:
            work: Everything that the method may look at.

        Returns:
            Tensors on the CPU.

        Raises:
            ValueError: If what is there does not allow a fit.
        """
        return {}

    @abstractmethod
    def log_probs(self, batch: BatchView, state: State) -> Tensor:
        """Log-probabilities of one batch: `[B, K]` float64, `-inf` for absent classes.

        Args:
            batch: The batch, seen through the model.
            state: From `fit`.
        """

    def members(
        self, model: nn.Module, state: State, snapshots: Sequence[Path]
    ) -> Sequence[AbstractContextManager[None]]:
        """Contexts that prepare the model for each member of an ensemble, and undo that.

        Args:
            model: The model.
            state: From `fit`.
            snapshots: Trained weights after the last epochs of the run, the latest last.
        """
        return [nullcontext()]

    def check_run(self, model: nn.Module, folder: Path | None) -> None:  # noqa: B027  (nothing more, for most)
        """Refuse, before training begins, what could not be fitted afterwards; beyond what `needs` says.

        Args:
            model: The model that is about to be trained.
            folder: Where the fit will be written, or None.

        Raises:
            ValueError: With what was found and what to do.
        """

    def refit(self, state: State, logits: Tensor, labels: Tensor) -> State | None:
        """The state fitted to other labelled logits, for methods that need nothing else; None for all others.

        With it the effect of the number of labels is known without another pass over data.

        Args:
            state: From `fit`.
            logits: `[N, K]` float64, `-inf` for absent classes; N may be 0.
            labels: `[N]` int64.
        """
        return None

    def hyperparameters(self, state: State) -> dict[str, float]:
        """Numbers for the record: all scalars of the state, and a vector as one number where its entries agree.

        Args:
            state: From `fit`.
        """
        return state_numbers(state)

    def with_defaults(self, curvature: Curvature) -> Self:
        """The method with what it leaves open taken from the run.

        Args:
            curvature: Curvature of methods that name none of their own.
        """
        names = {entry.name for entry in fields(self)}
        if "curvature" in names and getattr(self, "curvature") is None:  # noqa: B009  (not every method has it)
            return replace(self, curvature=curvature)  # type: ignore[call-arg]  # the field is there
        return self

    def options(self) -> dict[str, Any]:
        """All options but the name, as plain values."""
        return {entry.name: plain(getattr(self, entry.name)) for entry in fields(self) if entry.name != "name"}

    def fit_options(self) -> dict[str, Any]:
        """The options that decide about the fit, as plain values, and the class; a stored fit is compared with them."""
        chosen = {
            entry.name: plain(getattr(self, entry.name))
            for entry in fields(self)
            if entry.name not in ("name", "label") and not entry.metadata.get(_PREDICTION_ONLY)
        }
        return {"class": f"{type(self).__module__}:{type(self).__qualname__}", **chosen}


@dataclass(frozen=True)
class CurvatureMethod(Method):
    """A method that looks at one curvature.

    Attributes:
        curvature: Curvature of the posterior; None stands for the run's, see `Method.with_defaults`.
    """

    curvature: Curvature | None = option(None, "Curvature of the posterior; by default the run's.")

    @property
    def spec(self) -> Curvature:
        """The curvature.

        Raises:
            RuntimeError: If it has been left open and `with_defaults` has not been called.
        """
        if self.curvature is None:
            raise RuntimeError(f"{self.name} has no curvature yet: call with_defaults(Curvature(...)) first")
        return self.curvature


def state_numbers(state: State) -> dict[str, float]:
    """The scalars and short vectors of a state; a vector is one number where its entries agree."""
    numbers: dict[str, float] = {}
    for key, value in state.items():
        if value.dim() > 1 or not value.numel() or value.numel() > _LONGEST_VECTOR:
            continue
        flat = value.double().flatten()
        if bool((flat == flat[0]).all()):
            numbers[key] = float(flat[0])
        else:
            numbers |= {f"{key}_{index}": float(entry) for index, entry in enumerate(flat)}
    return numbers


def plain(value: Any) -> Any:
    """An option as JSON would give it back.

    Raises:
        TypeError: If JSON cannot hold it.
    """
    if isinstance(value, (Curvature, LayerSelection)):
        return value.description()
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, Path):
        return str(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(
        f"the option {value!r} is a {type(value).__name__}, which no file of a fit can hold; options are numbers, "
        "strings, paths, curvatures, and lists and mappings of these"
    )


def option_table(method: type[Method]) -> list[tuple[str, str, str]]:
    """Name, default and help of each option of a method, for help texts and docs."""
    rows = []
    for entry in fields(method):
        default = "" if entry.default is MISSING else repr(entry.default)
        rows.append((entry.name, default, entry.metadata.get("help", "")))
    return rows


def option_columns(method: Method) -> dict[str, bool | int | float | str]:
    """The options of a method as columns of a table, those of its curvature by their own names; open ones are left out.

    Args:
        method: The method.
    """
    columns: dict[str, bool | int | float | str] = {}
    for name, value in method.options().items():
        entries = value if isinstance(value, Mapping) else {name: value}
        columns |= {key: entry for key, entry in entries.items() if isinstance(entry, (bool, int, float, str))}
    columns.pop("label", None)
    return columns


def check_method_names(methods: Sequence[Method]) -> None:
    """Refuse methods that could not be told apart.

    Raises:
        ValueError: If there is no method, or a name stands for two.
        TypeError: If a method has an option that no file of a fit can hold.
    """
    for method in methods:
        method.options()
        if any(not isinstance(curvature, Curvature) for curvature in method.curvatures):
            raise TypeError(f"the curvature of {method.name} must be a Curvature(...), got {method.curvatures!r}")
    names = [method.name for method in methods]
    twice = sorted({name for name in names if names.count(name) > 1})
    unusable = [name for name in names if not _NAME.fullmatch(name)]
    if unusable:
        raise ValueError(
            "names of methods are parts of files and of logged keys, so they consist of lower-case letters, digits and "
            f"underscores; got {', '.join(map(repr, unusable))}"
        )
    if not names:
        raise ValueError("no method was asked for; give methods= at least one name or instance")
    if twice:
        raise ValueError(
            f"methods need distinct names, and {', '.join(twice)} stands there more than once; give one of them "
            "another name= and label="
        )


def check_choice(name: str, value: str, valid: Sequence[str]) -> None:
    """Refuse an option's value that is none of its choices.

    Raises:
        ValueError: Naming the option and what is valid.
    """
    if value not in valid:
        raise ValueError(f"unknown {name} {value!r}; valid are {', '.join(valid)}")


def scalar(value: float) -> Tensor:
    """A number as a state's tensor, float64."""
    return torch.tensor(value, dtype=torch.float64)
