"""The weights of a model against the record of those of a fit.

Weights agree if their values are equal, up to the rounding of merged adapters in float32, or if those of the model are
the recorded ones cast to the model's dtype, every one of them; see `same_or_cast`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile

import torch
from torch import nn

from bmoe_lightning.experts.fingerprint import weight_fingerprint
from bmoe_lightning.experts.sampled_values import dtype_word, same_or_cast
from bmoe_lightning.experts.types import ExpertLayer
from bmoe_lightning.experts.weight_record import WeightRecord, outside_record, weight_record
from bmoe_lightning.utils.messages import first_names


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
            f"the model has the weights of the fit cast from {dtype_word(fitted)} to {dtype_word(present)}. "
            f"Predictions differ by the rounding of the cast; load the model in {dtype_word(fitted)} to avoid that."
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
        if not same_or_cast(fitted.samples[name], dtype, present.samples[counterpart], its_dtype):
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
