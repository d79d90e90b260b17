"""AdamW with a float32 copy of weights in half precision."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.adamw import adamw

HALF_PRECISION = (torch.bfloat16, torch.float16)

# Weights that are updated together, unless one tensor alone has more: their gradients are alive in float32 meanwhile.
CHUNK = 1 << 26
_MASTER = "master"
_STEP = "step"


class MasterWeightAdamW(Optimizer):
    """AdamW that updates a float32 copy of weights in half precision, and rounds the copy to the weights.

    A bfloat16 value has eight significant bits: AdamW's update, about the learning rate, is lost wherever it is below
    half the spacing of values, 1/512 to 1/256 of the weight. The float32 copy (the master weights,
    https://arxiv.org/abs/1710.03740) accumulates such updates. With equal gradients it is what `torch.optim.AdamW`
    computes from float32 weights, bit for bit. Weights in float32 or float64 are updated in place, as by AdamW.

    A weight that something else has written since the last step (a checkpoint, averaged weights) replaces its copy.
    Copies and moments are in the state dict, so that a resumed run continues bit for bit. Works on the shards of FSDP2.

    Args:
        params: Parameters, or dictionaries of groups.
        lr: Learning rate.
        betas: Decay rates of the two moments.
        eps: Added to the denominator.
        weight_decay: Decoupled weight decay.
    """

    keeps_small_updates = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all weights that have a gradient.

        Args:
            closure: Function that computes gradients and returns the loss.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for chunk in _chunks([parameter for parameter in group["params"] if parameter.grad is not None]):
                self._update(chunk, group)
        return loss

    def _update(self, parameters: Sequence[nn.Parameter], group: dict[str, Any]) -> None:
        states = [self._state_of(parameter) for parameter in parameters]
        wide = [state.get(_MASTER, parameter) for state, parameter in zip(states, parameters, strict=True)]
        adamw(
            wide,
            [p.grad.to(w.dtype) for p, w in zip(parameters, wide, strict=True)],  # type: ignore[union-attr]
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state[_STEP] for state in states],
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        for parameter, values in zip(parameters, wide, strict=True):
            if values is not parameter:
                parameter.copy_(values)

    def _state_of(self, parameter: nn.Parameter) -> dict[str, Any]:
        state = self.state[parameter]
        if not state:
            state[_STEP] = torch.tensor(0.0)
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros_like(parameter, dtype=_wide(parameter), memory_format=torch.preserve_format)
        if parameter.dtype in HALF_PRECISION:
            if _MASTER not in state:  # none of another optimiser's states either
                state[_MASTER] = parameter.detach().to(_wide(parameter))
            master = state[_MASTER]
            unchanged = master.to(parameter.dtype) == parameter
            master.copy_(torch.where(unchanged, master, parameter))
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load copies, moments and settings of a state dict, also one of `torch.optim.AdamW`."""
        super().load_state_dict(state_dict)
        # The base class rounds states to the dtype of their weights.
        saved = [number for group in state_dict["param_groups"] for number in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for number, parameter in zip(saved, parameters, strict=True):
            for name, value in state_dict["state"].get(number, {}).items():
                if name != _STEP and isinstance(value, Tensor):
                    self.state[parameter][name] = value.to(parameter.device, _wide(parameter), copy=True)


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _chunks(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Consecutive parameters with at most `CHUNK` weights together, at least one at a time."""
    chunk: list[nn.Parameter] = []
    for parameter in parameters:
        if chunk and sum(other.numel() for other in chunk) + parameter.numel() > CHUNK:
            yield chunk
            chunk = []
        chunk.append(parameter)
    if chunk:
        yield chunk
