"""AdamW with a float32 copy of weights in half precision."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from bmoe_lightning.experts.fsdp import is_sharded

HALF_PRECISION = (torch.bfloat16, torch.float16)

# Weights that are updated together, unless one tensor alone has more: their gradients are alive in float32 meanwhile.
CHUNK = 1 << 26
# On a CPU a tensor is updated in pieces instead, whose temporaries stay in the cache: a third of the time.
_PIECE = 1 << 18
_MASTER = "master"
_STEP = "step"


class _Part(NamedTuple):
    """The tensors of one parameter that a step reads and writes, or of a piece of it.

    Attributes:
        weights: The parameter, detached.
        gradient: Its gradient.
        master: Its float32 copy; the same object as `weights` if it needs none.
        exp_avg: First moment.
        exp_avg_sq: Second moment.
        step: Number of steps so far.
    """

    weights: Tensor
    gradient: Tensor
    master: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: Tensor

    def pieces(self) -> Iterator[_Part]:
        rows = [tensor.view(-1).split(_PIECE) for tensor in self[:-1]]
        for weights, gradient, master, exp_avg, exp_avg_sq in zip(*rows, strict=True):
            copied = master if self.master is not self.weights else weights
            yield _Part(weights, gradient, copied, exp_avg, exp_avg_sq, self.step)


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
            trained = [parameter for parameter in group["params"] if parameter.grad is not None]
            for parts in _together([self._part(parameter) for parameter in trained]):
                _update(parts, group)
            for parameter in trained:
                self.state[parameter][_STEP] += 1
        return loss

    def _part(self, parameter: nn.Parameter) -> _Part:
        state = self.state[parameter]
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        if not state:
            state[_STEP] = torch.tensor(0.0)
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros_like(parameter, dtype=dtype, memory_format=torch.preserve_format)
        if parameter.dtype in HALF_PRECISION and _MASTER not in state:  # also after another optimiser's state
            state[_MASTER] = parameter.detach().to(dtype)
        weights = parameter.detach()
        assert parameter.grad is not None
        return _Part(
            weights,
            parameter.grad,
            state.get(_MASTER, weights),
            state["exp_avg"],
            state["exp_avg_sq"],
            state[_STEP],
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load copies, moments and settings of a state dict, also one of `torch.optim.AdamW`."""
        super().load_state_dict(state_dict)
        # The base class rounds states to the dtype of their weights.
        saved = [number for group in state_dict["param_groups"] for number in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for number, parameter in zip(saved, parameters, strict=True):
            dtype = torch.promote_types(parameter.dtype, torch.float32)
            for name, value in state_dict["state"].get(number, {}).items():
                if name != _STEP and isinstance(value, Tensor):
                    self.state[parameter][name] = value.to(parameter.device, dtype, copy=True)


def _update(parts: Sequence[_Part], group: dict[str, Any]) -> None:
    for part in parts:
        if part.master is not part.weights:
            _take_over(part.master, part.weights)
    adamw(
        [part.master for part in parts],
        [part.gradient.to(part.master.dtype) for part in parts],
        [part.exp_avg for part in parts],
        [part.exp_avg_sq for part in parts],
        [],
        [part.step.clone() for part in parts],  # it counts, and a parameter may have several parts
        amsgrad=False,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )
    for part in parts:
        if part.master is not part.weights:
            part.weights.copy_(part.master)


def _take_over(master: Tensor, weights: Tensor) -> None:
    """Copy weights that are not the rounded copy: something else has written them."""
    unchanged = master.to(weights.dtype) == weights
    master.copy_(torch.where(unchanged, master, weights))


def _together(parts: Iterable[_Part]) -> Iterator[list[_Part]]:
    """Parts to update together: pieces of one, or several with at most `CHUNK` weights, or a larger one alone."""
    chunk: list[_Part] = []
    for part in parts:
        if _is_divided(part):
            yield from ([piece] for piece in part.pieces())
            continue
        if chunk and sum(other.weights.numel() for other in chunk) + part.weights.numel() > CHUNK:
            yield chunk
            chunk = []
        chunk.append(part)
    if chunk:
        yield chunk


def _is_divided(part: _Part) -> bool:
    return part.weights.device.type == "cpu" and all(
        tensor.is_contiguous() and not is_sharded(tensor) for tensor in part[:-1]
    )
