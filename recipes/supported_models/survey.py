"""Does the library work on a model family, and how exactly: a tiny model against the dense oracle."""

from __future__ import annotations

import copy
import dataclasses
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bmoe_lightning.curvature import collect_factors
from bmoe_lightning.curvature.factors import KroneckerFactors
from bmoe_lightning.data.batches import PaddingSide
from bmoe_lightning.experts import ExpertLayer, find_expert_layers
from bmoe_lightning.experts.tapped_batches import tapped_batch
from bmoe_lightning.laplace import LaplacePosterior
from recipes.supported_models.catalogue import is_own, uses_interface
from recipes.supported_models.oracle import (
    DenseFactors,
    dense_factors,
    dense_logit_covariance,
    observe,
    weighted_jacobians,
)
from recipes.supported_models.overrides import settings_of
from recipes.supported_models.padding import larger_errors, padding_errors
from recipes.supported_models.routers import routers_of
from recipes.supported_models.state import differences, state_of
from recipes.supported_models.tiny import NUM_CLASSES, CannotBuildError, TinyFamily, build, wrapper_name
from recipes.supported_models.watch import SecondWeights, down_proj_weights

# Most families compute norms, rotary angles and router scores in float32 whatever their weights are. One rounding there
# is 6e-8; a few layers of weights of size 0.3 carry it on some tens of times. A wrong slot, expert, routing weight or
# bias shows as 1e-2 or more.
BOUND = 1e-5
PRIOR_PRECISION = 2.0


@dataclass(frozen=True)
class Row:
    """The results of one family.

    Attributes:
        family: Name of the family.
        interface: Whether its code uses transformers' experts interface.
        refused: Reason why it was not compared: it cannot be built small, or the library does not support it.
        failed: Error that ended the comparison, if one did.
        experts: Number of experts of each expert layer.
        layout: Way in which the experts are stored, in words.
        notes: Other features of the model, in words.
        errors: Relative error (norm of the difference over the norm) by quantity, largest over batches and layers, with
            weights in float64.
        float32_errors: Errors of the tapped forward against the model's `grouped_mm`, with weights in float32.
        disturbed: Names of states that the library did not restore; should be empty.
        padding: Error of a padded row against the same row alone, by the side of the padding; see `padding_errors`.
        routers: What its routers do, as probed, in words; None where they are not supported.
        router_refusal: Reason why routers are not supported, all or some.
        wrapper: Phrase for the notes, if what was compared is a multimodal wrapper, or one of two models is.
    """

    family: str
    interface: bool
    refused: str | None = None
    failed: str | None = None
    experts: tuple[int, ...] = ()
    layout: str = ""
    notes: tuple[str, ...] = ()
    errors: tuple[tuple[str, float], ...] = ()
    float32_errors: tuple[tuple[str, float], ...] = ()
    disturbed: tuple[str, ...] = ()
    padding: Mapping[PaddingSide, float] = field(default_factory=dict)
    routers: str | None = None
    router_refusal: str | None = None
    wrapper: str = ""

    @property
    def own(self) -> bool:
        """Whether it is a family of this library, not of transformers."""
        return is_own(self.family)

    @property
    def error(self) -> float | None:
        """The largest error with float64 weights; None where nothing was compared."""
        return max((value for _, value in self.errors), default=None)

    @property
    def float32_error(self) -> float | None:
        """The largest error with float32 weights; None where nothing was compared."""
        return max((value for _, value in self.float32_errors), default=None)

    @property
    def complaint(self) -> str | None:
        """The failure: an exception, an error above the bound, or state that was not restored; None if it passed."""
        wrong = [self.failed] if self.failed is not None else []
        wrong += [f"{name} {value:.1e}" for name, value in self.errors if not value < BOUND]
        wrong += [f"float32 {name} {value:.1e}" for name, value in self.float32_errors if not value < BOUND]
        wrong += [f"{name} not restored" for name in self.disturbed]
        return "; ".join(wrong) or None

    @property
    def padding_sides(self) -> tuple[PaddingSide, ...]:
        """The sides on which padding does not change a row."""
        return tuple(side for side, error in self.padding.items() if error < BOUND)

    @property
    def supported(self) -> bool:
        """Whether it was compared without a failure."""
        return self.refused is None and self.complaint is None


def survey(family: str) -> Row:
    """Build a family's tiny model; compare the library with the dense oracle and with the family's implementations.

    For a family with a text model and a multimodal wrapper around it, both are built and compared.

    Args:
        family: Name from `families()`.

    Raises:
        ValueError: If the family is unknown.
        RuntimeError: If expert layers of the experts interface are not found, or the oracle does not support the model.
    """
    text = _survey(family, wrapper=False)
    if text.refused is not None or wrapper_name(family) is None:
        return text
    return _both(text, _survey(family, wrapper=True))


def _survey(family: str, *, wrapper: bool) -> Row:
    interface = uses_interface(family)
    with torch.random.fork_rng():
        try:
            tiny = build(family, wrapper=wrapper)
        except CannotBuildError as error:
            return Row(family, interface, refused=str(error))
        try:
            layers = find_expert_layers(tiny.model)
        except ValueError as error:
            return Row(family, interface, refused=str(error))
        return _compare(tiny, layers, interface)


def _both(text: Row, wrapper: Row) -> Row:
    """One row for a family's text model and its wrapper: the larger errors, and the notes of both."""
    if wrapper.refused is not None:
        return dataclasses.replace(text, notes=(*text.notes, f"not its wrapper: {wrapper.refused}"))
    return dataclasses.replace(
        wrapper,  # which may have more expert layers, in its towers
        notes=tuple(dict.fromkeys((*text.notes, *wrapper.notes))),
        errors=_larger(text.errors, wrapper.errors),
        float32_errors=_larger(text.float32_errors, wrapper.float32_errors),
        disturbed=tuple(dict.fromkeys((*text.disturbed, *wrapper.disturbed))),
        padding=larger_errors(text.padding, wrapper.padding),
        routers=text.routers,
        router_refusal=text.router_refusal,
        wrapper="text model and wrapper, text only",
    )


def _larger(first: Sequence[tuple[str, float]], second: Sequence[tuple[str, float]]) -> tuple[tuple[str, float], ...]:
    both = _Errors()
    for name, value in (*first, *second):
        both.keep(name, value)
    return tuple(both.largest.items())


def _compare(tiny: TinyFamily, layers: Sequence[ExpertLayer], interface: bool) -> Row:
    model = tiny.model
    padding = padding_errors(tiny)
    routers, router_refusal = routers_of(tiny)
    weights = [down_proj_weights(model, layer) for layer in layers]
    _check_all_found(model, weights)
    observations = [observe(model, tiny.class_logits, batch, weights) for batch in tiny.batches]
    dense = dense_factors(observations, weights)
    if not any(layer.slots.any() for layer in dense):
        raise RuntimeError("no token reaches an expert layer")
    errors, float32_errors = _Errors(), _Errors()
    switchable = bool(_interface_modules(model))
    _compare_with_own(tiny, layers, ["eager", "batched_mm"] if switchable else ["eager"], errors)
    # grouped_mm takes no float64.
    single = dataclasses.replace(tiny, model=copy.deepcopy(model).float())
    fastest = _fastest_own(single, layers)
    _compare_with_own(single, layers, [fastest], float32_errors)
    with _unusual_state(model), warnings.catch_warnings():
        # Layers that text does not reach are in the notes.
        warnings.filterwarnings("ignore", "no token that affects a logit", UserWarning)
        before = state_of(model)
        factors = collect_factors(
            model, tiny.class_logits, tiny.batches, rank=_full_rank(layers), sketch="exact", layers=layers
        )
        posterior = LaplacePosterior(factors, prior_precision=PRIOR_PRECISION)
        covariances = [posterior.logit_covariance(model, tiny.class_logits, batch)[1] for batch in tiny.batches]
        disturbed = differences(before, state_of(model))
    _compare_factors(factors, dense, errors)
    for covariance, observation in zip(covariances, observations, strict=True):
        expected = dense_logit_covariance(observation.jacobians, dense, PRIOR_PRECISION)
        errors.add("covariance", covariance, expected)
    return Row(
        tiny.family,
        interface,
        experts=tuple(layer.num_experts for layer in layers),
        layout=_layout(model, layers),
        notes=_notes(tiny, layers, dense, fastest),
        errors=tuple(errors.largest.items()),
        float32_errors=tuple(float32_errors.largest.items()),
        disturbed=disturbed,
        padding=padding,
        routers=routers,
        router_refusal=router_refusal,
        wrapper="wrapper, text only" if tiny.wrapper else "",
    )


class _Errors:
    """The largest relative error of each quantity."""

    def __init__(self) -> None:
        self.largest: dict[str, float] = {}

    def add(self, name: str, value: Tensor, expected: Tensor) -> None:
        value, expected = value.double(), expected.double()
        present = expected != -torch.inf  # absent classes
        difference = torch.linalg.vector_norm((value - expected)[present])
        scale = torch.linalg.vector_norm(expected[present])
        self.keep(name, float(difference / scale if scale > 0 else difference))

    def keep(self, name: str, error: float) -> None:
        self.largest[name] = max(self.largest.get(name, 0.0), math.inf if math.isnan(error) else error)


def _check_all_found(model: nn.Module, weights: Sequence[SecondWeights]) -> None:
    """Check that every module of the experts interface has a layer; tied modules share one."""
    known = {id(parameter) for layer in weights for parameter in layer.parameters}
    missed = [name for name, module in _interface_modules(model) if id(module.down_proj) not in known]
    if missed:
        raise RuntimeError(f"find_expert_layers does not find {', '.join(missed)}")


def _interface_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The modules whose class `use_experts_implementation` has decorated."""
    return [(name, module) for name, module in model.named_modules() if _decorated(module)]


def _decorated(module: nn.Module) -> bool:
    return all(hasattr(module, attribute) for attribute in ("has_gate", "has_bias", "is_transposed"))


def _compare_with_own(
    tiny: TinyFamily, layers: Sequence[ExpertLayer], implementations: Sequence[str], errors: _Errors
) -> None:
    """Compare logits and weight gradients of the tapped forward with the model's implementations."""
    generator = torch.Generator().manual_seed(0)
    weights = [down_proj_weights(tiny.model, layer) for layer in layers]
    for batch in tiny.batches:
        mix = torch.rand(len(batch["labels"]), NUM_CLASSES, generator=generator, dtype=torch.float64)
        logits, jacobians = _tapped(tiny, layers, batch, mix)
        for name in implementations:
            with _implementation(tiny.model, name):
                own_logits, own_jacobians = weighted_jacobians(tiny.model, tiny.class_logits, batch, weights, mix)
            errors.add(f"logits ({name})", logits, own_logits)
            for jacobian, expected in zip(jacobians, own_jacobians, strict=True):
                errors.add(f"gradients ({name})", jacobian, expected)


def _fastest_own(tiny: TinyFamily, layers: Sequence[ExpertLayer]) -> str:
    """`grouped_mm` if it runs on the model, forward and backward: it requires rows of a multiple of 16 bytes."""
    if not _interface_modules(tiny.model):
        return "eager"
    weights = [down_proj_weights(tiny.model, layer) for layer in layers]
    try:
        with _implementation(tiny.model, "grouped_mm"):
            weighted_jacobians(tiny.model, tiny.class_logits, tiny.batches[0], weights, torch.ones(1, NUM_CLASSES))
    except RuntimeError:
        return "batched_mm"
    return "grouped_mm"


def _tapped(tiny: TinyFamily, layers: Sequence[ExpertLayer], batch: Any, mix: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Logits of the tapped forward, and the weight gradients `[E, d_out, d_in]` computed from its slots."""
    with tapped_batch(tiny.model, layers, tiny.class_logits, batch) as tapped:
        gradients = tapped.taps.gradients(tapped.logits, mix)
        jacobians = []
        for position, layer in enumerate(layers):
            slots = tapped.taps.slots(position)
            outer = gradients[position].double().unsqueeze(2) * slots.inputs.double().unsqueeze(1)
            jacobians.append(outer.new_zeros(layer.num_experts, *outer.shape[1:]).index_add(0, slots.experts, outer))
        return torch.where(tapped.present, tapped.logits.detach(), -torch.inf), jacobians


def _compare_factors(factors: KroneckerFactors, dense: Sequence[DenseFactors], errors: _Errors) -> None:
    for layer, expected in zip(factors.layers, dense, strict=True):
        errors.add("slots", layer.slots, expected.slots)
        errors.add("A", _written_out(layer.a_basis, layer.a_eigenvalues), expected.a)
        errors.add("G", _written_out(layer.g_basis, layer.g_eigenvalues), expected.g)


def _written_out(basis: Tensor, eigenvalues: Tensor) -> Tensor:
    return (basis * eigenvalues.unsqueeze(1)) @ basis.mT


def _full_rank(layers: Sequence[ExpertLayer]) -> int:
    return max(max(layer.d_in, layer.d_out) for layer in layers)


@contextmanager
def _implementation(model: PreTrainedModel, name: str) -> Iterator[None]:
    if not _interface_modules(model):  # there is only one implementation
        yield
        return
    before = model.get_experts_implementation()
    model.set_experts_implementation(name)
    try:
        yield
    finally:
        model.set_experts_implementation(before)


@contextmanager
def _unusual_state(model: PreTrainedModel) -> Iterator[None]:
    """Give every second module training mode, freeze every third parameter, and switch the implementation."""
    for index, module in enumerate(model.modules()):
        module.training = index % 2 == 0
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(index % 3 > 0)
    if _interface_modules(model):
        model.set_experts_implementation("grouped_mm")
    yield


def _layout(model: nn.Module, layers: Sequence[ExpertLayer]) -> str:
    """The layouts of the expert layers of a model, in words."""
    return "; ".join(dict.fromkeys(_layer_layout(model, layer) for layer in layers))


def _layer_layout(model: nn.Module, layer: ExpertLayer) -> str:
    words: list[str] = [layer.layout]
    module = model.get_submodule(layer.name)
    if _decorated(module):
        features: dict[str, Any] = {
            "bias": module.has_bias,
            "no gate": not module.has_gate,
            "interleaved": not module.is_concatenated,
            "norm after each expert": getattr(module, "has_post_expert_norm", False),  # from transformers 5.21 on
        }
    else:
        names = [name for name, _ in module.named_parameters()]
        features = {"bias": any(name.endswith("bias") for name in names)}
    features = {"transposed": layer.transposed, **features}
    words += [word for word, has in features.items() if has]
    if layer.down_proj != "down_proj":
        words.append(f"second layer `{layer.down_proj}`")
    return ", ".join(words)


def _notes(
    tiny: TinyFamily, layers: Sequence[ExpertLayer], dense: Sequence[DenseFactors], fastest: str
) -> tuple[str, ...]:
    model, remark = tiny.model, settings_of(tiny.family).remark
    notes = [remark] if remark is not None else []
    if _has_shared_experts(model):
        notes.append("shared experts")
    without = _layers_without_experts(model, layers)
    if without:
        notes.append(f"{without} layer{'s' if without > 1 else ''} without experts")
    unreached = sum(not layer.slots.any() for layer in dense)
    if unreached:  # image and audio towers may have expert layers
        notes.append(f"{unreached} of the expert layers not reached by text")
    if fastest == "batched_mm":
        notes.append("its own `grouped_mm` does not run at these sizes")
    if model.dtype != torch.float64:
        notes.append(f"compared in {str(model.dtype).removeprefix('torch.')}")
    return tuple(notes)


def _has_shared_experts(model: nn.Module) -> bool:
    """Whether the library finds shared experts."""
    try:
        return bool(find_expert_layers(model, shared_experts=True))
    except ValueError:
        return False


def _layers_without_experts(model: nn.Module, layers: Sequence[ExpertLayer]) -> int:
    """Number of blocks without experts in the module lists that contain the expert layers."""
    modules = dict(model.named_modules())
    rows, holders = set(), set()
    for layer in layers:
        path = layer.name.split(".")
        prefixes = [".".join(path[:length]) for length in range(1, len(path))]
        outermost = next((name for name in prefixes if isinstance(modules[name], nn.ModuleList)), None)
        if outermost is not None:
            rows.add(outermost)
            holders.add(prefixes[prefixes.index(outermost) + 1])
    return sum(len(list(modules[name].children())) for name in rows) - len(holders)
