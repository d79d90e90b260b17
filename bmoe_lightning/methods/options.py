"""Which methods are fitted and how, and the few numbers that fitting finds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from torch import nn

from bmoe_lightning.curvature.fisher import FisherName
from bmoe_lightning.curvature.kfac import ApproximationName, check_options
from bmoe_lightning.curvature.sketch import SketchName
from bmoe_lightning.experts import ExpertLayer, find_expert_layers, find_linear_layers
from bmoe_lightning.laplace.predictive import LINKS, NUM_SAMPLES, LinkName
from bmoe_lightning.laplace.prior import Scope

FactorDtype = Literal["float32", "bfloat16"]

METHODS = (
    "map",
    "mc_dropout",
    "checkpoint_ensemble",
    "deep_ensemble",
    "temperature",
    "laplace_evidence",
    "laplace_lpo",
    "laplace_temperature",
    "evidence_temperature",
    "shrunk_temperature",
)
"""Every method by name."""

NEEDS_EVIDENCE = frozenset({"laplace_evidence", "laplace_temperature", "evidence_temperature", "shrunk_temperature"})
NEEDS_POSTERIOR = NEEDS_EVIDENCE | {"laplace_lpo"}
NEEDS_LABELS = frozenset({"temperature", "laplace_lpo", "laplace_temperature", "shrunk_temperature"})
NEEDS_CALIBRATION = NEEDS_LABELS | {"evidence_temperature"}


@dataclass(frozen=True)
class FitSettings:
    """How methods are fitted and how they predict.

    Attributes:
        methods: names from `METHODS`.
        rank: eigenpairs kept of each Kronecker factor.
        fisher: `exact`, `mc` or `empirical`.
        approximation: K-FAC `expand` or `reduce`.
        sketch: `auto`, `nystrom`, `rsvd` or `exact`.
        evidence_scope: one prior precision a layer from the evidence (`layer`), or a single one (`global`).
        lpo_scope: the same for LPO.
        prior_mean: `pretrained` (the weights before fine-tuning) or `zero`.
        skip_layers: indices of expert layers that stay out of the posterior.
        link: `mc`, `isotropic`, `probit` or `laplace_bridge`.
        num_samples: Monte Carlo samples of a prediction.
        dropout: probability of MC dropout.
        dropout_samples: forward passes of MC dropout.
        seed: of every random choice.
        experts: pattern over module names, where expert layers are not found by structure; see `find_expert_layers`.
        down_proj: name of the second linear layer within an expert, likewise.
        shared_experts: whether shared experts get a posterior too; in the paper the routed ones alone do.
        linear_layers: pattern over the names of plain linear layers (`"*.lora_[AB].default"`) that get the posterior
            instead of the experts; see `find_linear_layers`.
        factor_dtype: what the factors' bases are kept and saved in, `float32` (of a float64 model float64) or
            `bfloat16`, half of it; computations are in float32 at least either way.
        offload_factors: whether the factors stay in main memory; see `LaplacePosterior`.

    Raises:
        ValueError: for an unknown name or a value out of range.
    """

    methods: tuple[str, ...] = ("map", "laplace_lpo")
    rank: int = 10
    fisher: FisherName = "exact"
    approximation: ApproximationName = "expand"
    sketch: SketchName = "auto"
    evidence_scope: Scope = "layer"
    lpo_scope: Scope = "layer"
    prior_mean: str = "pretrained"
    skip_layers: tuple[int, ...] = ()
    link: LinkName = "mc"
    num_samples: int = NUM_SAMPLES
    dropout: float = 0.1
    dropout_samples: int = 10
    seed: int = 0
    experts: str | None = None
    down_proj: str | None = None
    shared_experts: bool = False
    linear_layers: str | None = None
    factor_dtype: FactorDtype = "float32"
    offload_factors: bool = False

    def __post_init__(self) -> None:
        unknown = [name for name in self.methods if name not in METHODS]
        if unknown or not self.methods or len(set(self.methods)) < len(self.methods):
            raise ValueError(f"methods must be distinct names out of {', '.join(METHODS)}; got {list(self.methods)}")
        check_options(self.rank, self.fisher, self.approximation, self.sketch)
        choices: dict[str, tuple[str, Iterable[str]]] = {
            "evidence_scope": (self.evidence_scope, ("global", "layer")),
            "lpo_scope": (self.lpo_scope, ("global", "layer")),
            "prior_mean": (self.prior_mean, ("pretrained", "zero")),
            "link": (self.link, LINKS),
            "factor_dtype": (self.factor_dtype, get_args(FactorDtype)),
        }
        for name, (value, valid) in choices.items():
            if value not in valid:
                raise ValueError(f"unknown {name} {value!r}; valid are {', '.join(valid)}")
        if self.num_samples < 1 or self.dropout_samples < 1:
            raise ValueError("num_samples and dropout_samples must be at least 1")
        if "mc_dropout" in self.methods and not 0 < self.dropout < 1:
            raise ValueError(f"MC dropout needs a probability in (0, 1), got {self.dropout}")
        if self.linear_layers is not None and (self.experts or self.down_proj or self.shared_experts):
            raise ValueError(
                "linear_layers puts the posterior on plain layers instead of experts, so experts, down_proj and "
                "shared_experts have no part in it"
            )
        if self.needs_evidence and self.fisher != "exact" and self.evidence_temperatures:
            raise ValueError(f"the evidence temperature needs fisher='exact', got {self.fisher!r}")

    def find_layers(self, model: nn.Module) -> list[ExpertLayer]:
        """The layers of a model that get the posterior."""
        if self.linear_layers is not None:
            return find_linear_layers(model, self.linear_layers)
        return find_expert_layers(
            model, experts=self.experts, down_proj=self.down_proj, shared_experts=self.shared_experts
        )

    def fitting_differences(self, other: Mapping[str, Any]) -> list[str]:
        """Which settings that decide about a fit differ from those in a mapping, as `name=there (here: here)`."""
        mine = asdict(self)
        return [
            f"{name}={other[name]!r} (here {mine[name]!r})"
            for name in _FITTING_SETTINGS
            if name in other and _plain(other[name]) != _plain(mine[name])
        ]

    @property
    def needs_posterior(self) -> bool:
        """Whether a method looks at curvature."""
        return bool(NEEDS_POSTERIOR & set(self.methods))

    @property
    def needs_evidence(self) -> bool:
        """Whether a method takes its prior precision from the evidence."""
        return bool(NEEDS_EVIDENCE & set(self.methods))

    @property
    def needs_prior_mean(self) -> bool:
        """Whether a method measures how far the weights have come from those before fine-tuning."""
        return self.needs_evidence and self.prior_mean == "pretrained"

    @property
    def needs_calibration(self) -> bool:
        """Whether a method looks at the calibration split."""
        return bool(NEEDS_CALIBRATION & set(self.methods))

    @property
    def needs_labels(self) -> bool:
        """Whether a method looks at the labels of the calibration split."""
        return bool(NEEDS_LABELS & set(self.methods))

    @property
    def evidence_temperatures(self) -> bool:
        """Whether a method needs the evidence temperature."""
        return bool({"evidence_temperature", "shrunk_temperature"} & set(self.methods))


_FITTING_SETTINGS = (
    "rank", "fisher", "approximation", "sketch", "evidence_scope", "lpo_scope", "prior_mean", "skip_layers",
    "shared_experts", "linear_layers", "factor_dtype",
)  # fmt: skip


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, (list, tuple)) else value


@dataclass(frozen=True)
class FittedState:
    """All that was fitted beside the factors; a few numbers.

    Attributes:
        temperature: of temperature scaling.
        evidence_temperature: from the posterior, without labels.
        shrunk_temperature: fitted, shrunk towards the evidence temperature.
        laplace_temperature: on top of the Laplace predictive.
        evidence_precision: lambda of each layer, from the evidence.
        lpo_precision: lambda of each layer, from validation.
    """

    temperature: float | None = None
    evidence_temperature: float | None = None
    shrunk_temperature: float | None = None
    laplace_temperature: float | None = None
    evidence_precision: tuple[float, ...] | None = None
    lpo_precision: tuple[float, ...] | None = None

    def scalars(self) -> dict[str, float]:
        """Flat numbers for a logger; precisions that differ between layers get one entry each."""
        flat: dict[str, float] = {}
        for name, value in asdict(self).items():
            if isinstance(value, tuple) and len(set(value)) > 1:
                flat |= {f"posterior/{name}/layer_{i}": x for i, x in enumerate(value)}
            elif value is not None:
                flat[f"posterior/{name}"] = value[0] if isinstance(value, tuple) else value
        return flat

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> FittedState:
        """From what `asdict` gave, or JSON made of it.

        Raises:
            ValueError: for an unknown entry, or one of another type.
        """
        unknown = set(values) - {f.name for f in fields(cls)}
        if unknown:
            raise ValueError(f"unknown entries {sorted(unknown)} in the fitted state")
        checked: dict[str, Any] = {}
        for name, value in values.items():
            numbers = value if name.endswith("_precision") else [value]
            if value is not None and not (
                isinstance(numbers, (list, tuple)) and numbers and all(map(_is_positive, numbers))
            ):
                raise ValueError(f"{name} must hold positive numbers, got {value!r}")
            checked[name] = tuple(value) if isinstance(value, list) else value
        return cls(**checked)


def _is_positive(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf
