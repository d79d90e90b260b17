"""The choice of an AdamW for weights in half precision."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec
from typing import Any, Literal, get_args

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from bmoe_lightning.optim.master_weights import HALF_PRECISION, MasterWeightAdamW
from bmoe_lightning.utils.late_import import how_to_install

HalfPrecisionUpdates = Literal["master_weights", "stochastic_rounding", "nearest"]


def check_half_precision_updates(updates: str) -> None:
    """Check that a choice exists and that its library is installed.

    Raises:
        ValueError: If it is unknown.
        ImportError: If it is `stochastic_rounding` and torchao is not installed.
    """
    valid = get_args(HalfPrecisionUpdates)
    if updates not in valid:
        raise ValueError(f"unknown half_precision_updates {updates!r}; valid are {', '.join(valid)}")
    if updates == "stochastic_rounding" and find_spec("torchao") is None:
        raise ImportError(
            "half_precision_updates='stochastic_rounding' needs torchao, which is not installed; "
            f"{how_to_install('torchao')}, or use 'master_weights'"
        )


def make_adamw(
    parameters: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
    updates: HalfPrecisionUpdates = "master_weights",
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    weight_decay: float = 0.0,
    seed: int = 0,
) -> Optimizer:
    """AdamW (https://arxiv.org/abs/1711.05101); without parameters in half precision that of torch.

    Args:
        parameters: Parameters to train, or dictionaries of groups.
        updates: What happens to updates that are smaller than the spacing of half-precision values. `master_weights`
            accumulates them in a float32 copy of the weights (12 bytes for each weight with the moments, see
            `MasterWeightAdamW`), `stochastic_rounding` keeps them in expectation (4 bytes, bfloat16 only, with
            torchao), and `nearest` loses them (4 bytes).
        lr: Learning rate.
        betas: Decay rates of the two moments.
        weight_decay: Decoupled weight decay.
        seed: Seed of stochastic rounding.

    Raises:
        ValueError: If the choice is unknown, or float16 weights shall be rounded stochastically.
        ImportError: If torchao is needed and not installed.
    """
    check_half_precision_updates(updates)
    trained: list[Any] = list(parameters)
    groups = [entry["params"] if isinstance(entry, dict) else [entry] for entry in trained]
    half = {parameter.dtype for group in groups for parameter in group if parameter.dtype in HALF_PRECISION}
    if not half or updates == "nearest":
        return AdamW(trained, lr=lr, betas=betas, weight_decay=weight_decay)
    if updates == "master_weights":
        return MasterWeightAdamW(trained, lr=lr, betas=betas, weight_decay=weight_decay)
    if torch.float16 in half:
        raise ValueError(
            "half_precision_updates='stochastic_rounding' is for bfloat16, and the trained weights are in float16; use "
            "'master_weights'"
        )
    from bmoe_lightning.optim.stochastic_rounding import make_stochastic_adamw

    return make_stochastic_adamw(trained, lr=lr, betas=betas, weight_decay=weight_decay, seed=seed)
