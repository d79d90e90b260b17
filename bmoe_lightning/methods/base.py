"""The base class of all methods: options, requirements, fit and prediction.

A method is a frozen dataclass whose fields are its options. `fit` computes a state, a few tensors on the CPU, from the
workbench; `log_probs` is a pure function of a batch and that state. A method with several members (an ensemble)
prepares the model for each in a context manager; the outer loop is over members and the inner one over batches, so that
weights are loaded once per member and not once per batch.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor, nn

from bmoe_lightning.curvature.spec import Curvature
from bmoe_lightning.methods.needs import Needs
from bmoe_lightning.methods.options import affects_predictions_only, option, plain
from bmoe_lightning.routers.discovery import find_routers

if TYPE_CHECKING:
    from bmoe_lightning.laplace.posterior import LaplacePosterior
    from bmoe_lightning.methods.batch_view import BatchView
    from bmoe_lightning.methods.workbench import Workbench
    from bmoe_lightning.routers.types import Router

State = Mapping[str, Tensor]
"""Result of a fit: tensors on the CPU by name, small unless the method documents otherwise."""

PRIOR_PRECISION = "prior_precision"
"""Key in the states of Laplace methods: `[L]`, one value per layer. Serving without Lightning reads it."""

TEMPERATURE = "temperature"
"""Key in the states of methods that divide by one temperature; `export-temperature` reads it."""

_LONGEST_VECTOR = 1000
_NAME = re.compile(r"[a-z][a-z0-9_]*")


@dataclass(frozen=True)
class MemberFit:
    """The fit of one member of an ensemble, if it is another one than the run's.

    Attributes:
        state: State from `Method.fit`.
        posteriors: Posteriors whose covariances the member's predictions use, by the digest of their curvature.
        warnings: What makes the member's predictions doubtful, one sentence each; see `FitResult.warnings_of`.
    """

    state: State
    posteriors: Mapping[str, LaplacePosterior]
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Method(ABC):
    """A way to predict class probabilities.

    Attributes:
        name: Identifier in tables, logged names and files.
        label: Display name.
    """

    name: str = field(metadata={"help": "Identifier in tables, logged names and files."})
    label: str = field(metadata={"help": "Display name."})

    source: ClassVar[str] = ""
    """URL of the paper or documentation page that defines the method."""

    cost: ClassVar[str] = "one forward pass"
    """Cost of a prediction, for the table of methods."""

    positive_state: ClassVar[tuple[str, ...]] = ()
    """Entries that every state has, positive and finite in float64: a number, or a vector as `PRIOR_PRECISION`."""

    @property
    def needs(self) -> Needs:
        """Requirements besides the model."""
        return Needs()

    @property
    def curvatures(self) -> tuple[Curvature, ...]:
        """Curvatures that the fit or predictions use."""
        given = getattr(self, "curvature", None)
        return () if given is None else (given,)

    @property
    def prediction_curvatures(self) -> tuple[Curvature, ...]:
        """The subset of `curvatures` that predictions use; by default all."""
        return self.curvatures

    def curvatures_of(self, state: State) -> tuple[Curvature, ...]:
        """The subset of `prediction_curvatures` that predictions from a state use; by default all.

        Args:
            state: State from `fit`.
        """
        return self.prediction_curvatures

    @property
    def calibration_curvatures(self) -> tuple[Curvature, ...]:
        """The subset of `curvatures` whose covariances of the held-out data the fit uses; by default all, or none."""
        return self.curvatures if self.needs.calibration else ()

    @property
    def is_ensemble(self) -> bool:
        """Whether the model has to be prepared for each of several members."""
        return type(self).members is not Method.members

    @property
    def is_fitted_method(self) -> bool:
        """Whether the method overrides `fit`."""
        return type(self).fit is not Method.fit

    def fit(self, work: Workbench) -> State:
        """Fit the method; called on every rank, and the result of rank 0 is broadcast.

        Args:
            work: Workbench with all inputs of a fit.

        Returns:
            Tensors on the CPU.

        Raises:
            ValueError: If the inputs do not allow a fit.
        """
        return {}

    @abstractmethod
    def log_probs(self, batch: BatchView, state: State) -> Tensor:
        """Log-probabilities of one batch: `[B, K]` float64, `-inf` for absent classes.

        Args:
            batch: View of the batch.
            state: State from `fit`.
        """

    def uncertainty(self, batch: BatchView, state: State) -> dict[str, Tensor]:
        """Scores of how uncertain each prediction is, beyond those of its probabilities; none by default.

        Args:
            batch: View of the batch.
            state: State from `fit`.

        Returns:
            Scores by name, each `[B]` float64, higher where a prediction is more uncertain. Not asked of ensembles.
        """
        return {}

    def logit_covariance(self, batch: BatchView, state: State) -> tuple[Tensor, Tensor] | None:
        """The Gaussian over logits that predictions are a link of, as `BatchView.covariance`; None if there is none.

        By default it is that of the posterior, if there is one; arguments as of `log_probs`.
        """
        if PRIOR_PRECISION not in state or not self.curvatures:
            return None
        return batch.covariance(self.curvatures[0], state[PRIOR_PRECISION])

    def members(
        self, model: nn.Module, state: State, snapshots: Sequence[Path]
    ) -> Sequence[AbstractContextManager[MemberFit | None]]:
        """Context managers that set up the model for each member of an ensemble and restore it.

        Each yields the member's fit, or None for the state and the posteriors of the run.

        Args:
            model: The model.
            state: State from `fit`.
            snapshots: Snapshots of the trained weights after the last epochs, latest last.
        """
        return [nullcontext()]

    def check_members(self, model: nn.Module, state: State, snapshots: Sequence[Path]) -> None:
        """Check before the first batch of an evaluation that all members can be set up; arguments as of `members`."""
        self.members(model, state, snapshots)

    def check_run(
        self,
        model: nn.Module,
        folder: Path | None,
        *,
        ranks_per_node: int = 1,
        trained: Sequence[nn.Parameter] | None = None,
    ) -> None:
        """Check before training that the method can be fitted afterwards, in addition to `needs`.

        Args:
            model: The model that is about to be trained.
            folder: Folder to which the fit will be written, or None.
            ranks_per_node: Number of processes that share this machine's memory; each of them fits.
            trained: The parameters that are trained, as in `fit_methods`; by default those that require gradients. If
                some do not require gradients, which of all these are trained is known after training only.

        Raises:
            ValueError: If the method could not be fitted; by default if it needs routers and the model has none, or a
                kernel replaces them.
        """
        if self.needs.routers:
            find_routers(model)

    def modules_beside(self, model: nn.Module) -> Sequence[nn.Module]:
        """Modules that stand beside the model and whose weights `fit` copies: a fit to other ones is not taken for it.

        Args:
            model: The model.

        Returns:
            The modules, parts of the model.

        Raises:
            ValueError: If there are none, and `fit` needs them.
        """
        return ()

    def check_routers(  # noqa: B027  (most methods check nothing else)
        self, model: nn.Module, routers: Sequence[Router], run: Callable[[], Tensor]
    ) -> None:
        """Check on one batch, before training, that routers can be what the method makes of them; see `Needs.routers`.

        Args:
            model: The model that is about to be trained.
            routers: Its routers, probed.
            run: Runs the model on the batch, in evaluation mode and without gradients.

        Raises:
            ValueError: If they cannot.
        """

    def check_state(self, state: State) -> None:
        """Check the values of a state that was read from a file; by default see `positive_state`.

        Args:
            state: State as from `fit`.

        Raises:
            ValueError: If an entry is missing, or no fit has such a value.
        """
        for key in self.positive_state:
            if key not in state:
                raise ValueError(f"it lacks {key!r}")
            value, dimensions = state[key], int(key == PRIOR_PRECISION)
            if value.dtype != torch.float64 or value.dim() != dimensions:
                raise ValueError(f"{key!r} has dtype {value.dtype} and shape {tuple(value.shape)}")
            if not bool((value.isfinite() & (value > 0)).all()):
                raise ValueError(f"{key!r} must be positive and finite, and is {value.tolist()}")
        for key, value in state.items():
            if value.is_floating_point() and not bool(value.isfinite().all()):
                raise ValueError(f"{key!r} has non-finite values")

    def refit(self, state: State, logits: Tensor, labels: Tensor) -> State | None:
        """Refit the state to other labelled logits, for methods that need no other data; None for all others.

        It measures the effect of the number of labels without another pass over the data.

        Args:
            state: State from `fit`.
            logits: `[N, K]` float64, `-inf` for absent classes; N may be 0.
            labels: `[N]` int64.
        """
        return None

    def hyperparameters(self, state: State) -> dict[str, float]:
        """Fitted hyperparameters to log: all scalars of the state, and a vector of equal entries as one number.

        Args:
            state: State from `fit`.
        """
        return state_numbers(state)

    def with_defaults(self, curvature: Curvature) -> Self:
        """The method with unset options filled in from the run.

        Args:
            curvature: Curvature of methods that specify none.
        """
        names = {entry.name for entry in fields(self)}
        if "curvature" in names and getattr(self, "curvature") is None:  # noqa: B009  (not every method has the field)
            return replace(self, curvature=curvature)  # type: ignore[call-arg]  # the field exists
        return self

    def options(self) -> dict[str, Any]:
        """All options except the name, as JSON values."""
        return {entry.name: plain(getattr(self, entry.name)) for entry in fields(self) if entry.name != "name"}

    def fit_options(self) -> dict[str, Any]:
        """The class and the options that affect the fit, as JSON values; a stored fit is compared with them."""
        chosen = {
            entry.name: plain(getattr(self, entry.name))
            for entry in fields(self)
            if entry.name not in ("name", "label") and not affects_predictions_only(entry)
        }
        return {"class": f"{type(self).__module__}:{type(self).__qualname__}", **chosen}


@dataclass(frozen=True)
class CurvatureMethod(Method):
    """A method that uses one curvature.

    Attributes:
        curvature: Curvature of the posterior; None is the run's, see `Method.with_defaults`.
    """

    curvature: Curvature | None = option(None, "Curvature of the posterior; by default the run's.")

    @property
    def spec(self) -> Curvature:
        """The curvature.

        Raises:
            RuntimeError: If the curvature is None because `with_defaults` has not been called.
        """
        if self.curvature is None:
            raise RuntimeError(f"{self.name} has no curvature yet; call with_defaults(Curvature(...)) first")
        return self.curvature


def state_numbers(state: State) -> dict[str, float]:
    """The scalars and short vectors of a state; a vector of equal entries is one number."""
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


def check_method_names(methods: Sequence[Method]) -> None:
    """Check that there are methods and that their names are valid and distinct.

    Raises:
        ValueError: If there is no method, a name is invalid, or two methods share one.
        TypeError: If an option is not JSON-serialisable, or a curvature is not a `Curvature`.
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
            "method names become file names and logged keys, so they must consist of lower-case letters, digits and "
            f"underscores; got {', '.join(map(repr, unusable))}"
        )
    if not names:
        raise ValueError("no method was given; pass methods= with at least one name or instance")
    if twice:
        raise ValueError(
            f"methods need distinct names, and {', '.join(twice)} occurs more than once; give one of them another "
            "name= and label="
        )


def check_choice(name: str, value: str, valid: Sequence[str]) -> None:
    """Check that the value of an option is one of its choices.

    Raises:
        ValueError: If it is not; the message names the option and the choices.
    """
    if value not in valid:
        raise ValueError(f"unknown {name} {value!r}; valid are {', '.join(valid)}")


def scalar(value: float) -> Tensor:
    """A number as a float64 tensor of a state."""
    return torch.tensor(value, dtype=torch.float64)
