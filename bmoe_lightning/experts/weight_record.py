"""A sample of a model's effective weights, by which they are recognised after merging, renaming or casting.

`weight_fingerprint` is an exact digest of parameters by name. A record holds values instead: those of every weight with
its adapters merged, 64 for each parameter, each expert's part of a fused one, or each row of a larger matrix one. So it
can be compared with a model whose adapters were merged since, that lies under another attribute, or that was cast.

Weights agree if their values are equal, up to the rounding of merged adapters in float32 (`_ROUNDING`), or if those of
the model are the recorded ones cast to the model's dtype, every one of them. A training step at learning rate 5e-5
moves weights a thousand times further than that rounding, and changes some per cent of the values of a cast.

A head or an adapter outside of the transformers model shapes the logits too. Those parameters outside of it that
`class_logits` uses (see `UsedWeights`) have a record of their own, and are compared if the model at hand has them: a
posterior may be served with the transformers model alone.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from bmoe_lightning.experts.fingerprint import fingerprinted_module, joined_samples, sample, weight_fingerprint
from bmoe_lightning.experts.fsdp import has_shards, reshard
from bmoe_lightning.experts.types import ExpertLayer
from bmoe_lightning.experts.wrappers.accelerate import materialized, offloaded_weights
from bmoe_lightning.experts.wrappers.names import inner_name, plain_name, unwrapped
from bmoe_lightning.experts.wrappers.peft import MODULES_TO_SAVE, is_adapter, merged_copy
from bmoe_lightning.experts.wrappers.quantised import unusable
from bmoe_lightning.utils.messages import first_names

_ROUNDING = 1e-6  # relative to the value or the root mean square of the sample, whichever is larger
_VALUES, _DESCRIPTION, _OUTSIDE = "values", "description", "outside."


@dataclass(frozen=True, eq=False)
class WeightRecord:
    """Sampled effective weights, by plain names relative to `fingerprinted_module`.

    Attributes:
        layers: Plain names of the expert layers.
        samples: Values of each parameter, float32 on the CPU; empty for a quantised one.
        dtypes: Dtype of each parameter.
        outside: Record of the parameters outside of `fingerprinted_module`, by plain names relative to the model; its
            `layers` is the plain name of that module. None in files of an earlier version.
    """

    layers: tuple[str, ...]
    samples: Mapping[str, Tensor]
    dtypes: Mapping[str, torch.dtype]
    outside: WeightRecord | None = None

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, WeightRecord):
            return NotImplemented
        if (self.layers, dict(self.dtypes), self.outside) != (other.layers, dict(other.dtypes), other.outside):
            return False
        return all(_equal(values, other.samples[name]) for name, values in self.samples.items())

    __hash__ = object.__hash__

    def part(self, names: Collection[str]) -> WeightRecord:
        """The record of some of the parameters."""
        samples = {name: values for name, values in self.samples.items() if name in names}
        return replace(self, samples=samples, dtypes={name: self.dtypes[name] for name in samples})

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
        outside = {} if self.outside is None else self.outside.tensors()
        return {
            _VALUES: torch.cat([torch.empty(0), *self.samples.values()]),
            _DESCRIPTION: text.clone(),
            **{f"{_OUTSIDE}{name}": value for name, value in outside.items()},
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> WeightRecord | None:
        """The record that `tensors` describes; None if there is none.

        Raises:
            ValueError: If they describe no record.
        """
        if _VALUES not in tensors or _DESCRIPTION not in tensors:
            return None
        outside = {name.removeprefix(_OUTSIDE): value for name, value in tensors.items() if name.startswith(_OUTSIDE)}
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
                cls.from_tensors(outside),
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

    def joined(self, other: WeightComparison) -> WeightComparison:
        """This comparison and one of other parameters."""
        return WeightComparison(
            self.same and other.same,
            self.differing + other.differing,
            self.compared + other.compared,
            tuple(dict.fromkeys(self.casts + other.casts)),
            self.left_out + other.left_out,
        )

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
        self._outside: dict[tuple[ExpertLayer, ...], WeightRecord] = {}

    def compared(
        self, layers: Sequence[ExpertLayer], fingerprint: str, record: WeightRecord | None
    ) -> WeightComparison:
        """Compare them with those of a fit; see `same_weights`. A collective, if they are sharded."""
        key = tuple(layers)
        found = self._compared_inside(key, fingerprint, record)
        if not (found.same and fingerprint and record is not None and record.outside is not None):
            return found
        if key not in self._outside:
            self._outside[key] = outside_record(self.model, key)
        return found.joined(compare_outside(record.outside, self._outside[key]))

    def _compared_inside(
        self, key: tuple[ExpertLayer, ...], fingerprint: str, record: WeightRecord | None
    ) -> WeightComparison:
        if not fingerprint:
            return WeightComparison(same=True)
        if key not in self._fingerprints:
            self._fingerprints[key] = weight_fingerprint(self.model, key)
        if self._fingerprints[key] == fingerprint:
            return WeightComparison(same=True)
        if record is None or not record.samples:
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
    prefix = _name_of(root, model)
    names = tuple(plain_name(layer.name.removeprefix(f"{prefix}.") if prefix else layer.name) for layer in layers)
    return WeightRecord(names, *_sampled(_effective_parameters(root, ""), sharded=sharded))


def outside_record(model: nn.Module, layers: Sequence[ExpertLayer]) -> WeightRecord:
    """Record a model's effective weights outside of `fingerprinted_module`. A collective, if they are sharded.

    Those that lie on the meta device or are not initialised, which no forward pass can use, are recorded by name alone.

    Args:
        model: The model.
        layers: Its expert layers.
    """
    reshard(model)
    root = fingerprinted_module(model, layers)
    sharded = has_shards(model)
    inside = {id(parameter) for parameter in root.parameters()}
    tied = {plain_name(n) for n, p in model.named_parameters(remove_duplicate=False) if id(p) in inside}
    found = _effective_parameters(model, "", skipped=root, merged=not sharded)
    parameters = ((name, weight, dtype) for name, weight, dtype in found if name not in tied)
    return WeightRecord(
        (plain_name(_name_of(root, model)),), *_sampled(parameters, sharded=sharded, replicas_agree=False)
    )


def _name_of(part: nn.Module, model: nn.Module) -> str:
    return next((name for name, module in model.named_modules() if module is part), "")


def _sampled(
    parameters: Iterable[tuple[str, Tensor | None, torch.dtype]], *, sharded: bool, replicas_agree: bool = True
) -> tuple[dict[str, Tensor], dict[str, torch.dtype]]:
    """Samples and dtypes by name; see `joined_samples`."""
    samples: dict[str, Tensor] = {}
    dtypes: dict[str, torch.dtype] = {}
    for name, weight, dtype in parameters:
        none = torch.empty(0, 3) if sharded else torch.empty(0)
        samples.setdefault(name, none if weight is None else sample(weight, sharded=sharded))
        dtypes.setdefault(name, dtype)
    if not samples:
        return {}, {}
    values = joined_samples(list(samples.values()), sharded=sharded, replicas_agree=replicas_agree)
    parts = values.split([len(part) for part in samples.values()])
    return dict(zip(samples, parts, strict=True)), dtypes


def compare_weights(fitted: WeightRecord, present: WeightRecord) -> WeightComparison:
    """Compare recorded weights with those of a model, whatever the names of the modules that hold the model."""
    before, after = _prefixes(fitted.layers, present.layers)
    theirs, ours = _names(fitted.samples, before), _names(present.samples, after)
    missing = sorted(theirs.inside.keys() ^ ours.inside.keys())
    left_out = tuple(sorted(set(theirs.outside) ^ set(ours.outside)))
    return _compared(fitted, present, _shared(theirs, ours), missing, left_out)


def compare_outside(fitted: WeightRecord, present: WeightRecord) -> WeightComparison:
    """Compare the recorded weights outside of the fingerprinted module with those that a model has there.

    The model may lack them, and have others, such as those of a teacher. Where the fingerprinted module has another
    name too, one parameter's name must be the end of the other's, and of no third one's.
    """
    before, after = _prefixes(fitted.layers, present.layers)
    shared = _shared(_names(fitted.samples, before), _names(present.samples, after))
    ours = set(present.samples) - {name for _, name in shared}
    for name in fitted.samples.keys() - {name for name, _ in shared}:
        same_end = [other for other in ours if f".{other}".endswith(f".{name}") or f".{name}".endswith(f".{other}")]
        shared += [(name, other) for other in same_end if len(same_end) == 1]
    left_out = tuple(sorted(fitted.samples.keys() - {name for name, _ in shared}))
    return _compared(fitted, present, shared, [], left_out)


def _compared(
    fitted: WeightRecord,
    present: WeightRecord,
    shared: Iterable[tuple[str, str]],
    missing: Iterable[str],
    left_out: tuple[str, ...],
) -> WeightComparison:
    """Compare the parameters of two records that have the names of a pair in them."""
    shared, differing = list(shared), list(missing)
    casts: dict[tuple[torch.dtype, torch.dtype], None] = {}
    for name, counterpart in shared:
        dtype, its_dtype = fitted.dtypes[name], present.dtypes[counterpart]
        if not _agree(fitted.samples[name], dtype, present.samples[counterpart], its_dtype):
            differing.append(counterpart)
        elif its_dtype.itemsize < min(dtype.itemsize, 4) and len(fitted.samples[name]):
            casts[dtype, its_dtype] = None
    return WeightComparison(not differing, tuple(differing), len(shared), tuple(casts), left_out)


@dataclass(frozen=True)
class _Names:
    """The parameters within a module and outside of it; those within by their names relative to it."""

    inside: dict[str, str]
    outside: set[str]


def _names(parameters: Iterable[str], prefix: str) -> _Names:
    inside = {name.removeprefix(prefix): name for name in parameters if name.startswith(prefix)}
    return _Names(inside, set(parameters) - set(inside.values()))


def _shared(theirs: _Names, ours: _Names) -> list[tuple[str, str]]:
    """The names, in both records, of the parameters that both have."""
    inside = [(theirs.inside[name], ours.inside[name]) for name in theirs.inside if name in ours.inside]
    return inside + [(name, name) for name in theirs.outside if name in ours.outside]


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


def _effective_parameters(
    module: nn.Module, prefix: str, *, skipped: nn.Module | None = None, merged: bool = True
) -> Iterator[tuple[str, Tensor | None, torch.dtype]]:
    """Plain name, value and dtype of every parameter; the value of one that cannot be read is None.

    Args:
        module: The module.
        prefix: What the names begin with.
        skipped: A module whose parameters are left out.
        merged: Whether adapters are merged.
    """
    if module is skipped:
        return
    children = dict(module.named_children())
    inner = inner_name(module)
    if merged and is_adapter(module) and not any(unusable(parameter) for parameter in module.parameters()):
        adapted = {name: parameter.dtype for name, parameter in unwrapped(module).named_parameters()}
        for name, weight, dtype in _effective_parameters(merged_copy(module), ""):
            yield f"{prefix}{name}", weight, adapted.get(name, dtype)
    elif merged and inner is not None and (len(children) == 1 or MODULES_TO_SAVE in children):
        yield from _effective_parameters(module.get_submodule(inner), prefix, skipped=skipped)
    else:
        for name, parameter in module.named_parameters(recurse=False):
            readable = not unusable(parameter) and (skipped is None or _has_values(module, parameter))
            weight = materialized(module, name).detach() if readable else None
            yield plain_name(f"{prefix}{name}"), weight, parameter.dtype
        for name, child in children.items():
            yield from _effective_parameters(child, f"{prefix}{name}.", skipped=skipped, merged=merged)


def _has_values(module: nn.Module, parameter: Tensor) -> bool:
    return not is_lazy(parameter) and (parameter.device.type != "meta" or offloaded_weights(module) is not None)


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
