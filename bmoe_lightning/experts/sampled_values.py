"""Sampled values of weights, and whether two samples are of the same weights up to the rounding of their dtypes.

The same weights are loaded in another precision, and adapters that are merged on another machine, or by another version
of a library, round differently. A training step at learning rate 5e-5 moves weights a thousand times further than
float32 rounds, and changes some per cent of the values of a half precision.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bmoe_lightning.experts.fingerprint import joined_samples, sample

ROUNDING = 1e-6
"""Rounding of arithmetic in float32, relative to a value or the root mean square of the sample, whichever is larger."""

# Arithmetic that rounds differently in float32 moves at most this share of values to a neighbour in a half precision.
_NEIGHBOURS = 1e-3


@dataclass(frozen=True, eq=False)
class SampledValues:
    """A sample of weights.

    Attributes:
        values: Values, float32 on the CPU.
        dtype: Dtype of the weights, to which their values are rounded; float32 for a wider one.
    """

    values: Tensor
    dtype: torch.dtype

    def same(self, other: SampledValues) -> bool:
        """Whether both may be of the same weights, each rounded to its dtype."""
        return _same_before_rounding(self.values, self.dtype, other.values, other.dtype)

    def text(self) -> tuple[str, str]:
        """Dtype and values as text, for a checkpoint; see `from_text`."""
        return dtype_word(self.dtype), base64.b64encode(self.values.contiguous().numpy().tobytes()).decode()

    @classmethod
    def from_text(cls, dtype: str, values: str) -> SampledValues:
        """The sample of a `text`.

        Raises:
            AttributeError, TypeError, ValueError: If it is none.
        """
        found = getattr(torch, dtype)
        if not isinstance(found, torch.dtype):
            raise ValueError(f"{dtype!r} is no dtype")
        content = bytearray(base64.b64decode(values, validate=True))
        return cls(torch.frombuffer(content, dtype=torch.float32) if content else torch.empty(0), found)


def sampled_values(weights: Sequence[Tensor], dtype: torch.dtype, *, sharded: bool) -> SampledValues:
    """Sample weights, see `sample`. A collective, if they are sharded.

    Args:
        weights: Weights, detached; at least one.
        dtype: Dtype of the parameters, which may be narrower than that of `weights` with adapters merged.
        sharded: Whether the model is sharded by FSDP2.

    Raises:
        ValueError: If ranks differ in weights that several of them hold.
    """
    values = joined_samples([sample(weight, sharded=sharded) for weight in weights], sharded=sharded)
    return SampledValues(values, dtype if dtype in (torch.bfloat16, torch.float16) else torch.float32)


def same_or_cast(fitted: Tensor, dtype: torch.dtype, present: Tensor, its_dtype: torch.dtype) -> bool:
    """Whether values are those of a fit, up to the rounding of merged adapters, or those of a fit after a cast.

    Args:
        fitted: Values of the fit, float32.
        dtype: Dtype of the fitted weights.
        present: Values at hand, float32.
        its_dtype: Dtype of the weights at hand.
    """
    if equal_values(fitted.to(its_dtype), present):
        return True
    if dtype == its_dtype and equal_values(present.to(dtype), fitted):
        return True  # adapters of the present model, merged in the fitted one
    return fitted.shape == present.shape and bool(((fitted - present).abs() <= ROUNDING * _scale(fitted)).all())


def equal_values(first: Tensor, second: Tensor) -> bool:
    """Whether float32 values, or those of a cast, are equal to others; NaN equals NaN."""
    return first.shape == second.shape and bool(((first.float() == second) | (first.isnan() & second.isnan())).all())


def dtype_word(dtype: torch.dtype) -> str:
    """The name of a dtype without `torch.`."""
    return str(dtype).removeprefix("torch.")


def _same_before_rounding(one: Tensor, dtype: torch.dtype, other: Tensor, other_dtype: torch.dtype) -> bool:
    if equal_values(one.to(other_dtype), other) or equal_values(other.to(dtype), one):
        return True
    if one.shape != other.shape:
        return False
    apart = (one.double() - other.double()).abs() - ROUNDING * _scale(one.double())
    # All that round to a value lie within half a spacing of it.
    largest = _half_spacing(one, dtype) + _half_spacing(other, other_dtype)
    if not bool((apart <= largest).all()):
        return False
    # Two roundings to one half precision are equal, but where the value lies between them.
    return dtype != other_dtype or int((apart > 0).sum()) <= max(1, _NEIGHBOURS * len(one))


def _half_spacing(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Half the distance between neighbours in a half precision; 0 in float32, whose rounding is `ROUNDING`."""
    if dtype not in (torch.bfloat16, torch.float16):
        return torch.zeros_like(values, dtype=torch.float64)
    limits = torch.finfo(dtype)
    magnitudes = values.double().abs().clamp(min=limits.smallest_normal)
    # frexp's mantissa is in [.5, 1).
    return torch.ldexp(torch.full_like(magnitudes, limits.eps / 4), torch.frexp(magnitudes).exponent)


def _scale(values: Tensor) -> Tensor:
    return torch.maximum(values.abs(), values.square().mean().sqrt())
