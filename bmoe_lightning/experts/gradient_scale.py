"""Backward passes through float16, scaled by a power of two so that gradients do not underflow.

Gradients at the experts' outputs are often below float16's smallest number, 6e-8, and would be zero: the slot would not
count. A power of two scales them without rounding. The largest weight of a logit starts close to float16's largest
number, for each batch anew so that results do not depend on the batches before, and lower where a gradient overflows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bmoe_lightning.experts.streaming import Output, differentiated
from bmoe_lightning.utils.devices import to_cpu

# Exponents of the largest weight.
_FIRST, _STEP, _LAST = 15, 4, -9


def runs_float16(*tensors: Tensor) -> bool:
    """Whether tensors of a computation are in float16, or autocast to it is on for their device."""
    if any(tensor.dtype == torch.float16 for tensor in tensors):
        return True
    device = tensors[0].device.type
    return torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16


class GradientScale:
    """The scale of the backward passes of one batch.

    Attributes:
        factor: The scale of the last pass, a power of two.
    """

    def __init__(self) -> None:
        self.factor = 1.0
        self._largest = _FIRST

    @property
    def smallest(self) -> float:
        """The smallest gradient that the last pass represented with full precision."""
        return torch.finfo(torch.float16).smallest_normal / self.factor

    def differentiated(
        self,
        logits: Tensor,
        weights: Tensor,
        outputs: Sequence[Output],
        agreed: Callable[[bool], bool],
        backward: Callable[..., tuple[Tensor | None, ...]] = differentiated,
    ) -> tuple[Tensor | None, ...]:
        """Gradients as of `differentiated`, multiplied by the scale; see `unscaled`.

        Args:
            logits: Logits `[B, K]`.
            weights: Weight of each logit, `[B, K]` float64.
            outputs: Outputs to differentiate with respect to.
            agreed: Whether a condition holds on all ranks that run in lockstep.
            backward: A backward pass, as `differentiated`.

        Raises:
            RuntimeError: If they are not finite at any scale.
        """
        _, magnitude = math.frexp(float(weights.abs().max()))
        while True:
            # Within the range of float32, in which it is divided by.
            self.factor = 2.0 ** min(self._largest - magnitude, 100)
            found = backward(logits, (weights * self.factor).to(logits.dtype), outputs)
            if agreed(_all_finite(found)):
                return found
            if self._largest <= _LAST:
                raise RuntimeError(
                    "gradients at the experts' outputs overflow in float16; use bfloat16 or float32 for the model"
                )
            self._largest -= _STEP

    def unscaled(self, gradient: Tensor) -> Tensor:
        """A gradient of the last pass without the scale, in at least float32."""
        wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
        return wide / self.factor


def _all_finite(gradients: Sequence[Tensor | None]) -> bool:
    """Whether all gradients are finite, with one synchronisation for each device."""
    finite = [gradient.isfinite().all().view(1) for gradient in gradients if gradient is not None]
    return all(bool(value) for value in to_cpu(finite))
