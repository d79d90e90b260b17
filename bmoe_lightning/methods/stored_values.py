"""Checks of the values in a fit's index and of its held-out data, beyond the digests of their files."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bmoe_lightning.curvature.gradient_share import GradientShare


def stored_options(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The fit options in a method's entry of the index.

    Raises:
        TypeError: If they are no mapping.
    """
    options = entry["options"]
    if not isinstance(options, dict):
        raise TypeError(f"options must be a mapping, got {options!r}")
    return options


def stored_texts(value: Any) -> tuple[str, ...]:
    """A list of strings of the index.

    Raises:
        TypeError: If it is anything else.
    """
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise TypeError(f"expected a list of strings, got {value!r}")
    return tuple(value)


def stored_sizes(value: Any) -> dict[str, int]:
    """A mapping of names to sizes in bytes.

    Raises:
        TypeError: If it is anything else.
    """
    if not isinstance(value, dict) or any(type(size) is not int or size < 1 for size in value.values()):
        raise TypeError(f"expected a mapping of names to sizes in bytes, got {value!r}")
    return value


def stored_shares(value: Any) -> dict[str, GradientShare]:
    """The shares of the trained weights' gradient that curvatures cover, by digest; unknown keys are left alone.

    Raises:
        TypeError: If it is anything else.
        KeyError: If an entry lacks a field.
    """
    if not isinstance(value, dict):
        raise TypeError(f"expected a mapping of curvatures to shares, got {value!r}")
    found = {}
    for digest, entry in value.items():
        required = {name: entry[name] for name in ("share", "standard_error", "num_passes", "reason")}
        added = {name: entry[name] for name in ("num_trained", "is_assumed") if name in entry}
        share = GradientShare(**required, **added)
        numbers = [number for number in (share.share, share.standard_error) if number is not None]
        valid = all(type(number) in (int, float) and 0 <= number < math.inf for number in numbers)
        if not valid or type(share.num_passes) is not int or not isinstance(share.reason, str):
            raise TypeError(f"expected a share of a gradient, got {entry!r}")
        count = share.num_trained
        if not (count is None or (type(count) is int and count >= 0)) or type(share.is_assumed) is not bool:
            raise TypeError(f"expected a share of a gradient and the number of trained weights, got {entry!r}")
        if share.share is not None and share.share > 1:
            raise TypeError(f"expected a share of a gradient of at most 1, got {entry!r}")
        found[digest] = share
    return found


def stored_calibration(held_out: Mapping[str, Tensor] | None) -> tuple[Tensor, Tensor | None] | None:
    """The held-out logits `[N, K]` and labels `[N]` (or None) of a fit; None if it has none.

    Raises:
        ValueError: If they are not those of a fit.
    """
    if held_out is None:
        return None
    logits, labels = held_out.get("logits", torch.empty(0)), held_out.get("labels")
    valid = logits.dtype == torch.float64 and logits.dim() == 2
    valid = valid and not bool((logits.isnan() | (logits == torch.inf)).any())
    if valid and labels is not None:
        valid = labels.dtype == torch.int64 and labels.shape == logits.shape[:1]
        valid = valid and bool((labels < logits.shape[1]).all())
    if not valid:
        raise ValueError("its held-out logits and labels are not those of a fit")
    return logits, labels
