"""Options of a curvature pass: layers, labels and rank.

Methods with equal specifications share one pass and one file.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from torch import nn

from bmoe_lightning.curvature.fisher import FISHERS, FisherName
from bmoe_lightning.curvature.sketch import SKETCHES, SketchName
from bmoe_lightning.experts import ExpertLayer, find_expert_layers, find_linear_layers
from bmoe_lightning.experts.discovery import DOWN_PROJ
from bmoe_lightning.experts.wrappers.peft import lora_matrices
from bmoe_lightning.utils.messages import numbered

ApproximationName = Literal["expand", "reduce"]
APPROXIMATIONS: tuple[ApproximationName, ...] = ("expand", "reduce")
FactorDtype = Literal["float32", "bfloat16"]
FACTOR_DTYPES: tuple[FactorDtype, ...] = ("float32", "bfloat16")

CACHE_BYTES = 1 << 29
"""Memory in bytes of the covariance terms of held-out data: 512 MiB, so that one curvature adds less than 1 GiB."""

_NOT_OF_THE_FACTORS = ("offload", "cache_bytes")


class LayerSelection(ABC):
    """Selection of the layers that get a posterior; subclasses are frozen dataclasses, so that they are hashable."""

    @abstractmethod
    def find(self, model: nn.Module) -> list[ExpertLayer]:
        """Find the layers in a model.

        Raises:
            ValueError: If the model has no such layer.
        """

    def description(self) -> dict[str, Any]:
        """Class and options as JSON values, for files and comparisons.

        Raises:
            TypeError: If an option is not JSON-serialisable.
        """
        options = asdict(self)  # type: ignore[call-overload]  # a dataclass
        content = {"selection": f"{type(self).__module__}:{type(self).__qualname__}", **options}
        found: dict[str, Any] = json.loads(json.dumps(content))
        return found


@dataclass(frozen=True)
class ExpertLayers(LayerSelection):
    """The second linear layer (`down_proj`) of every expert.

    Attributes:
        experts: Shell-style pattern over module names, for experts that are not found by structure; see
            `find_expert_layers`.
        down_proj: Name of the second linear layer within one expert, for the same case.
        shared_experts: Whether shared experts, which process every token, get a posterior too.
        projections: Projections of the experts that get a posterior: `down_proj`, and `gate_up_proj` for those before
            the activation; see `find_expert_layers`.
    """

    experts: str | None = None
    down_proj: str | None = None
    shared_experts: bool = False
    projections: tuple[str, ...] = (DOWN_PROJ,)

    def __post_init__(self) -> None:
        # A command line or a YAML file gives a list, which is not hashable.
        object.__setattr__(self, "projections", tuple(self.projections))

    def find(self, model: nn.Module) -> list[ExpertLayer]:
        """Find the expert layers; see `find_expert_layers`."""
        return find_expert_layers(
            model,
            experts=self.experts,
            down_proj=self.down_proj,
            shared_experts=self.shared_experts,
            projections=self.projections,
        )

    def description(self) -> dict[str, Any]:
        """Class and options as JSON values; those of earlier versions, which had `down_proj` alone, are the same."""
        found = super().description()
        if self.projections == (DOWN_PROJ,):
            del found["projections"]
        return found


@dataclass(frozen=True)
class LinearLayers(LayerSelection):
    """Plain linear layers by name: LoRA matrices, attention projections, dense MLPs.

    Attributes:
        names: Shell-style pattern over module names, such as `"*.lora_[AB].default"`.
        allow_tied: Whether tied weights are accepted; see `find_linear_layers`.
    """

    names: str
    allow_tied: bool = False

    def find(self, model: nn.Module) -> list[ExpertLayer]:
        """Find the linear layers; see `find_linear_layers`."""
        return find_linear_layers(model, self.names, allow_tied=self.allow_tied)


@dataclass(frozen=True)
class LoRALayers(LayerSelection):
    """The matrices A and B of every layer that PEFT adapts by LoRA, each as a linear layer.

    Attributes:
        matrices: `AB`, or one of them. The input of A is the activation that LoRA's dropout drops.
    """

    matrices: Literal["AB", "A", "B"] = "AB"

    def __post_init__(self) -> None:
        if self.matrices not in ("AB", "A", "B"):
            raise ValueError(f"unknown matrices {self.matrices!r} of LoRA; valid are AB, A, B")

    def find(self, model: nn.Module) -> list[ExpertLayer]:
        """Find the matrices of the active adapters.

        Raises:
            ValueError: If there are none, they are merged, or they do not run as linear layers.
        """
        names = lora_matrices(model, self.matrices)
        if not names:
            raise ValueError(
                f"{type(model).__name__} has no layer with an active, unmerged LoRA adapter of PEFT; fine-tune it with "
                "LoRAFinetuner, or put the posterior on other layers"
            )
        return find_linear_layers(model, names)


@dataclass(frozen=True)
class Curvature:
    """Options of one curvature pass.

    Attributes:
        rank: Number of eigenpairs stored per Kronecker factor. Rank 0 runs no pass: the posterior is the prior.
        fisher: Labels of the Fisher: `exact` (all classes, weighted by their probability), `mc` (one sampled label) or
            `empirical` (the true label).
        approximation: K-FAC form, `expand` or `reduce` (Eschenhagen et al. 2023, https://arxiv.org/abs/2311.00636).
        sketch: Low-rank algorithm: `auto`, `nystrom`, `rsvd` or `exact`; see `make_sketch`.
        layers: Layers that get the posterior.
        skip_layers: Indices of layers without a posterior, whose weights are deterministic.
        max_batches: Maximum number of training batches of the pass on each rank; the curvature is scaled up to the full
            data set. None uses all.
        factor_dtype: Dtype in which the bases are stored, `float32` (float64 for a float64 model) or `bfloat16`;
            computations are in at least float32.
        offload: Whether the factors are offloaded to the CPU; those of a layer are copied to its device when used.
        cache_bytes: Memory in bytes of the covariance terms of the held-out data under this curvature, for methods that
            are fitted on them; a table needs as much for each of its curvatures. Terms that do not fit are compact, or
            those of a random subset; see `CacheBuilder`. Methods fitted on such terms are fitted again where a
            completed fit has more memory.

    Raises:
        ValueError: For an unknown name or a value out of range.
        TypeError: If a value has another type.
    """

    rank: int = 10
    fisher: FisherName = "exact"
    approximation: ApproximationName = "expand"
    sketch: SketchName = "auto"
    layers: LayerSelection = field(default_factory=ExpertLayers)
    skip_layers: tuple[int, ...] = ()
    max_batches: int | None = None
    factor_dtype: FactorDtype = "float32"
    offload: bool = False
    cache_bytes: int = CACHE_BYTES

    def __post_init__(self) -> None:
        # A command line or a YAML file gives a list, which is not hashable.
        object.__setattr__(self, "skip_layers", tuple(self.skip_layers))
        for option, number in (
            ("rank", self.rank),
            ("max_batches", self.max_batches or 0),
            ("cache_bytes", self.cache_bytes),
        ):
            if type(number) is not int:
                raise TypeError(f"{option} must be an integer, got {number!r}")
        if any(type(index) is not int for index in self.skip_layers):
            raise TypeError(f"skip_layers must be indices of layers, got {self.skip_layers!r}")
        if not isinstance(self.layers, LayerSelection):
            raise TypeError(
                f"layers must be a selection such as LinearLayers({str(self.layers)!r}), got {self.layers!r}"
            )
        if self.rank < 0:
            raise ValueError(f"rank must be at least 0, got {self.rank}")
        for name, value, valid in (
            ("fisher", self.fisher, FISHERS),
            ("approximation", self.approximation, APPROXIMATIONS),
            ("sketch", self.sketch, SKETCHES),
            ("factor_dtype", self.factor_dtype, FACTOR_DTYPES),
        ):
            if value not in valid:
                raise ValueError(f"unknown {name} {value!r}; valid are {', '.join(valid)}")
        if self.max_batches is not None and self.max_batches < 1:
            raise ValueError(f"max_batches must be at least 1, got {self.max_batches}")

        if self.cache_bytes < 1:
            raise ValueError(f"cache_bytes must be at least 1, got {self.cache_bytes}")

    @property
    def collects(self) -> bool:
        """Whether the curvature needs a pass over the training data."""
        return self.rank > 0

    def without_pass(self) -> Curvature:
        """The prior over the same layers (rank 0): the covariance of the logits is then `1 / lambda J J^T`."""
        return Curvature(rank=0, layers=self.layers, skip_layers=self.skip_layers, cache_bytes=self.cache_bytes)

    def of_all_layers(self) -> Curvature:
        """The same curvature without `skip_layers`: a layer's factors do not depend on which others are skipped."""
        return replace(self, skip_layers=())

    def find_layers(self, model: nn.Module) -> list[ExpertLayer]:
        """Find the layers that are tapped, including `skip_layers`.

        Raises:
            ValueError: If there are none, or `skip_layers` names a layer that does not exist, or all of them.
        """
        layers = self.layers.find(model)
        unknown = set(self.skip_layers) - {layer.index for layer in layers}
        if unknown:
            raise ValueError(
                f"skip_layers has {sorted(unknown)}, and no layer has such an index; use those of the layers "
                f"({numbered({layer.index: layer.name for layer in layers})})"
            )
        if len(set(self.skip_layers)) == len(layers):
            raise ValueError(f"skip_layers names all {len(layers)} layers, which leaves no posterior; skip fewer")
        return layers

    def posterior_layers(self, model: nn.Module) -> list[ExpertLayer]:
        """Find the layers that get the posterior."""
        return [layer for layer in self.find_layers(model) if layer.index not in self.skip_layers]

    def description(self) -> dict[str, Any]:
        """All options that affect the factors, as JSON values."""
        values = asdict(replace(self, layers=_Nothing()))
        plain = {name: value for name, value in values.items() if name not in _NOT_OF_THE_FACTORS}
        return {**plain, "skip_layers": list(self.skip_layers), "layers": self.layers.description()}

    @property
    def digest(self) -> str:
        """Eight hexadecimal digits that identify this specification, for file names."""
        text = json.dumps(self.description(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:8]


@dataclass(frozen=True)
class _Nothing(LayerSelection):
    """Placeholder while the other options are converted to JSON values."""

    def find(self, model: nn.Module) -> list[ExpertLayer]:  # noqa: ARG002
        return []
