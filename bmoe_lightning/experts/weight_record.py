"""A sample of a model's effective weights, by which they are recognised after merging, renaming or casting.

`weight_fingerprint` is an exact digest of parameters by name. A record holds values instead: those of every weight with
its adapters merged, 64 for each parameter, each expert's part of a fused one, or each row of a larger matrix one. So it
can be compared with a model whose adapters were merged since, that lies under another attribute, or that was cast.

Weights agree if their values are equal, up to the rounding of merged adapters in float32 (`_ROUNDING`), or if those of
the model are the recorded ones cast to the model's dtype, every one of them. A training step at learning rate 5e-5
moves weights a thousand times further than that rounding, and changes some per cent of the values of a cast.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile

import torch
from torch import Tensor, nn

from bmoe_lightning.experts.fingerprint import fingerprinted_module, joined_samples, sample, weight_fingerprint
from bmoe_lightning.experts.fsdp import has_shards, reshard
from bmoe_lightning.experts.types import ExpertLayer
from bmoe_lightning.experts.wrappers.accelerate import materialized
from bmoe_lightning.experts.wrappers.names import inner_name, plain_name, unwrapped
from bmoe_lightning.experts.wrappers.peft import MODULES_TO_SAVE, is_adapter, merged_copy
from bmoe_lightning.experts.wrappers.quantised import unusable
from bmoe_lightning.utils.messages import first_names

_ROUNDING = 1e-6  # relative to the value or the root mean square of the sample, whichever is larger
_VALUES, _DESCRIPTION = "values", "description"


@dataclass(frozen=True, eq=False)
class WeightRecord:
    """Sampled effective weights, by plain names relative to `fingerprinted_module`.

    Attributes:
        layers: Plain names of the expert layers.
        samples: Values of each parameter, float32 on the CPU; empty for a quantised one.
        dtypes: Dtype of each parameter.
    """

    layers: tuple[str, ...]
    samples: Mapping[str, Tensor]
    dtypes: Mapping[str, torch.dtype]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, WeightRecord):
            return NotImplemented
        if (self.layers, dict(self.dtypes)) != (other.layers, dict(other.dtypes)):
            return False
        return all(_equal(values, other.samples[name]) for name, values in self.samples.items())

    __hash__ = object.__hash__

    def tensors(self) -> dict[str, Tensor]:
        """The record as tensors, for a safetensors file; see `from_tensors`."""
        described = {
            "layers": list(self.layers),
            "parameters": [
                [name, len(values), str(self.dtypes[name]).removeprefix("torch.")]
                for name, values in self.samples.items()
            ],
        }
        text = torch.frombuffer(bytearray(json.dumps(described).encode()), dtype=torch.uint8)
        return {_VALUES: torch.cat(list(self.samples.values())), _DESCRIPTION: text.clone()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> WeightRecord | None:
        """The record that `tensors` describes; None if there is none.

        Raises:
            ValueError: If they describe no record.
        """
        if _VALUES not in tensors or _DESCRIPTION not in tensors:
            return None
        try:
            described = json.loads(bytes(tensors[_DESCRIPTION].tolist()))
            parameters = [
                (str(name), int(length), getattr(torch, dtype)) for name, length, dtype in described["parameters"]
            ]
            parts = tensors[_VALUES].split([length for _, length, _ in parameters])
            return cls(
                tuple(map(str, described["layers"])),
                {name: part for (name, _, _), part in zip(parameters, parts, strict=True)},
                {name: dtype for name, _, dtype in parameters},
            )
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"its record of the weights is damaged ({error!r})") from error


@dataclass(frozen=True)
class WeightComparison:
    """The weights of a model against those of a fit.

    Attributes:
        same: Whether they are those of the fit, up to casts and the rounding of merged adapters.
        differing: Names of parameters that differ, or that one of the two lacks; empty where only digests are known.
        compared: Number of parameters that both have.
        casts: Dtypes of the fit and of the model, of parameters that were cast to a narrower one.
        left_out: Names of parameters outside of the part that both have, which were not compared.
    """

    same: bool
    differing: tuple[str, ...] = ()
    compared: int = 0
    casts: tuple[tuple[torch.dtype, torch.dtype], ...] = ()
    left_out: tuple[str, ...] = ()

    def reason(self) -> str:
        """What differs, as a parenthesis with a space before it; empty where only digests are known."""
        if not self.differing:
            return ""
        return (
            f" ({len(self.differing)} parameters differ, {self.compared} were compared: {first_names(self.differing)})"
        )

    def remarks(self) -> list[str]:
        """What a user should know of weights that are accepted, in sentences."""
        found = [
            f"the model has the weights of the fit cast from {_word(fitted)} to {_word(present)}. Predictions differ "
            f"by the rounding of the cast; load the model in {_word(fitted)} to avoid that."
            for fitted, present in self.casts
        ]
        if self.left_out:
            found.append(
                f"{len(self.left_out)} parameters outside of the part that both the fitted model and this one have are "
                f"not compared: {first_names(self.left_out)}."
            )
        return found


def same_weights(
    model: nn.Module, layers: Sequence[ExpertLayer], fingerprint: str, record: WeightRecord | None
) -> WeightComparison:
    """Compare a model's weights with those of a fit. A collective, if they are sharded.

    Args:
        model: The model.
        layers: Its expert layers, located from those of the fit.
        fingerprint: Fingerprint of the fitted weights; empty accepts all.
        record: Their record; None compares fingerprints alone.
    """
    return PresentWeights(model).compared(layers, fingerprint, record)


class PresentWeights:
    """The weights of a model, to compare with those of several fits; they must not change meanwhile.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._fingerprints: dict[tuple[ExpertLayer, ...], str] = {}
        self._records: dict[tuple[ExpertLayer, ...], WeightRecord | None] = {}

    def compared(
        self, layers: Sequence[ExpertLayer], fingerprint: str, record: WeightRecord | None
    ) -> WeightComparison:
        """Compare them with those of a fit; see `same_weights`. A collective, if they are sharded."""
        key = tuple(layers)
        if not fingerprint:
            return WeightComparison(same=True)
        if key not in self._fingerprints:
            self._fingerprints[key] = weight_fingerprint(self.model, key)
        if self._fingerprints[key] == fingerprint:
            return WeightComparison(same=True)
        if record is None:
            return WeightComparison(same=False)
        if key not in self._records:
            self._records[key] = weight_record(self.model, key)
        present = self._records[key]
        return WeightComparison(same=False) if present is None else compare_weights(record, present)


def weight_record(model: nn.Module, layers: Sequence[ExpertLayer]) -> WeightRecord | None:
    """Record a model's effective weights. A collective, if they are sharded.

    Args:
        model: The model.
        layers: Its expert layers.

    Returns:
        The record; None if the model is sharded and has adapters, since no rank has the merged weights.
    """
    reshard(model)
    root = fingerprinted_module(model, layers)
    sharded = has_shards(model)
    if sharded and any(is_adapter(module) for module in root.modules()):
        return None
    samples: dict[str, Tensor] = {}
    dtypes: dict[str, torch.dtype] = {}
    for name, weight, dtype in _effective_parameters(root, ""):
        none = torch.empty(0, 3) if sharded else torch.empty(0)
        samples.setdefault(name, none if weight is None else sample(weight, sharded=sharded))
        dtypes.setdefault(name, dtype)
    values = joined_samples(list(samples.values()), sharded=sharded)
    parts = values.split([len(part) for part in samples.values()])
    prefix = next((name for name, module in model.named_modules() if module is root), "")
    return WeightRecord(
        tuple(plain_name(layer.name.removeprefix(f"{prefix}.") if prefix else layer.name) for layer in layers),
        dict(zip(samples, parts, strict=True)),
        dtypes,
    )


def compare_weights(fitted: WeightRecord, present: WeightRecord) -> WeightComparison:
    """Compare recorded weights with those of a model, whatever the names of the modules that hold the model."""
    before, after = _prefixes(fitted.layers, present.layers)
    theirs, ours = _names(fitted.samples, before), _names(present.samples, after)
    differing = sorted(theirs.inside.keys() ^ ours.inside.keys())
    shared = [(theirs.inside[name], ours.inside[name]) for name in theirs.inside if name in ours.inside]
    shared += [(name, name) for name in theirs.outside if name in ours.outside]
    casts: dict[tuple[torch.dtype, torch.dtype], None] = {}
    for name, counterpart in shared:
        dtype, its_dtype = fitted.dtypes[name], present.dtypes[counterpart]
        if not _agree(fitted.samples[name], dtype, present.samples[counterpart], its_dtype):
            differing.append(counterpart)
        elif its_dtype.itemsize < min(dtype.itemsize, 4) and len(fitted.samples[name]):
            casts[dtype, its_dtype] = None
    left_out = sorted(set(theirs.outside) ^ set(ours.outside))
    return WeightComparison(not differing, tuple(differing), len(shared), tuple(casts), tuple(left_out))


@dataclass(frozen=True)
class _Names:
    """The parameters within a module and outside of it; those within by their names relative to it."""

    inside: dict[str, str]
    outside: set[str]


def _names(parameters: Iterable[str], prefix: str) -> _Names:
    inside = {name.removeprefix(prefix): name for name in parameters if name.startswith(prefix)}
    return _Names(inside, set(parameters) - set(inside.values()))


def _prefixes(fitted: Sequence[str], present: Sequence[str]) -> tuple[str, str]:
    """What stands before the common end of the layers' names in both, with the dot after it."""
    ends = [_common_end(first.split("."), second.split(".")) for first, second in zip(fitted, present, strict=True)]
    pairs = {
        (".".join(first.split(".")[:-end]), ".".join(second.split(".")[:-end]))
        for first, second, end in zip(fitted, present, ends, strict=True)
    }
    if 0 in ends or len(pairs) != 1:
        return "", ""
    return tuple(f"{prefix}." if prefix else "" for prefix in pairs.pop())  # type: ignore[return-value]


def _common_end(first: Sequence[str], second: Sequence[str]) -> int:
    pairs = zip(reversed(first), reversed(second), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _agree(fitted: Tensor, dtype: torch.dtype, present: Tensor, its_dtype: torch.dtype) -> bool:
    if _equal(fitted.to(its_dtype), present):
        return True
    if dtype == its_dtype and _equal(present.to(dtype), fitted):
        return True  # adapters of the present model, merged in the fitted one
    if fitted.shape != present.shape:
        return False
    scale = torch.maximum(fitted.abs(), fitted.square().mean().sqrt())
    return bool(((fitted - present).abs() <= _ROUNDING * scale).all())


def _equal(first: Tensor, second: Tensor) -> bool:
    return first.shape == second.shape and bool(((first.float() == second) | (first.isnan() & second.isnan())).all())


def _effective_parameters(module: nn.Module, prefix: str) -> Iterator[tuple[str, Tensor | None, torch.dtype]]:
    """Plain name, value and dtype of every parameter with adapters merged; the value of a quantised one is None."""
    children = dict(module.named_children())
    inner = inner_name(module)
    if is_adapter(module) and not any(unusable(parameter) for parameter in module.parameters()):
        adapted = {name: parameter.dtype for name, parameter in unwrapped(module).named_parameters()}
        for name, weight, dtype in _effective_parameters(merged_copy(module), ""):
            yield f"{prefix}{name}", weight, adapted.get(name, dtype)
    elif inner is not None and (len(children) == 1 or MODULES_TO_SAVE in children):
        yield from _effective_parameters(module.get_submodule(inner), prefix)
    else:
        for name, parameter in module.named_parameters(recurse=False):
            weight = None if unusable(parameter) else materialized(module, name).detach()
            yield plain_name(f"{prefix}{name}"), weight, parameter.dtype
        for name, child in children.items():
            yield from _effective_parameters(child, f"{prefix}{name}.")


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
