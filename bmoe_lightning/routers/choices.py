"""Put the logits of Bayesian routers into a model while it runs, or the experts that they chose and their weights.

Where weights are normalised over the chosen experts, logits of `-inf` for all others make a router choose these.
Elsewhere weights depend on the logits of all experts, and no logits make it choose others than the K largest with the
weights that the model would give them: there, experts and weights are replaced in what the router's module returns. A
gate that is a linear layer returns logits alone.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bmoe_lightning.experts.threads import applies, scope
from bmoe_lightning.experts.tied_weights import parameter_owners
from bmoe_lightning.routers.base import BayesianRouter
from bmoe_lightning.routers.interception import intercepted_routers, tied_routers
from bmoe_lightning.routers.probe import relative_distance
from bmoe_lightning.routers.scores import at_least_float32
from bmoe_lightning.routers.selection import restrict
from bmoe_lightning.routers.types import Router

Logits = Callable[[BayesianRouter, Tensor, Tensor], Tensor]
"""`(net, input u [tokens, D], logits [tokens, N]) -> [tokens, N]` in any dtype: logits, or log-weights of a choice."""

# Relative distance of the model's outputs with the same choice: routers compute scores in float32 at least, and weights
# that differ by that rounding may be rounded apart to half precision, wherever the model computes in it.
_ROUNDING, _HALF_ROUNDING = 1e-5, 3e-2
_HALF = (torch.bfloat16, torch.float16)


@contextmanager
def injected_routers(
    model: nn.Module, nets: Sequence[BayesianRouter], logits_of: Logits, *, everywhere: bool = False
) -> Iterator[None]:
    """Replace what routers compute while a model runs; a net that is still leaves its router as it is.

    Args:
        model: The model.
        nets: The Bayesian routers.
        logits_of: Function of a net that gives its logits or log-weights; the given logits themselves to leave them.
        everywhere: Whether this applies in all threads; see `intercepted_routers`.

    Raises:
        RuntimeError: If a router does not return the experts and weights that are to be replaced; raised from within
            the model.
    """
    of_router = {net.router: net for net in nets if not net.is_still}

    def replace(router: Router, u: Tensor, logits: Tensor) -> Tensor:
        net = of_router[router]
        pending.choices.pop(router, None)  # of a call that an exception ended
        with torch.autocast(logits.device.type, enabled=False):
            found = logits_of(net, u, logits)
        if found is logits or not net.returns_choice:
            return found.to(logits.dtype)
        pending.choices[router] = found, logits
        return logits

    pending = _Pending()
    with ExitStack() as stack:
        stack.enter_context(intercepted_routers(model, list(of_router), replace, everywhere=everywhere))
        returning = [router for router, net in of_router.items() if net.returns_choice]
        if returning:
            _replace_choices(stack, model, returning, pending, None if everywhere else scope())
        yield


def choice_ways(model: nn.Module, routers: Sequence[Router], run: Callable[[], Tensor]) -> bool:
    """Whether choices have to replace what routers return (True), or can be told by logits (False).

    Measured: the model has to compute the same with the experts that it chooses itself.

    Args:
        model: The model.
        routers: Its routers, probed.
        run: Runs the model on one batch, in evaluation mode and without gradients; called four times at most.

    Raises:
        ValueError: If neither is exact: weights depend on the experts that are not chosen, and a router does not return
            its choice.
    """
    plain, half = run(), [any(parameter.dtype in _HALF for parameter in model.parameters())]

    def by_logits(router: Router, _u: Tensor, logits: Tensor) -> Tensor:
        half.append(logits.dtype in _HALF or torch.is_autocast_enabled(logits.device.type))
        return top_choice(router, logits).to(logits.dtype)

    with intercepted_routers(model, routers, by_logits):
        output = run()
    tolerance = _HALF_ROUNDING if any(half) else _ROUNDING
    if relative_distance(output, plain) <= tolerance:
        return False
    nets = [_Greedy(router) for router in routers]
    with (
        suppress(_NoChoiceError),
        injected_routers(model, nets, lambda net, _u, logits: top_choice(net.router, logits)),
    ):
        output = run()
    if relative_distance(output, plain) > tolerance:
        raise ValueError(
            f"the weights of the experts of {type(model).__name__} depend on those that are not chosen, and its "
            "routers do not return the choice as a module, so that drawn experts cannot get the weights that the model "
            "would give them; use a Bayesian router of another kind for this model"
        )
    return True


def top_choice(router: Router, logits: Tensor) -> Tensor:
    """The log-weights `[tokens, N]` of the K largest logits, `-inf` for others: the choice that is not random.

    Args:
        router: The router, probed, with a softmax.
        logits: `[tokens, N]`.
    """
    assert router.top_k is not None
    log_weights = at_least_float32(logits).log_softmax(-1)
    return restrict(log_weights, log_weights.topk(router.top_k, dim=-1).indices)


class _NoChoiceError(RuntimeError):
    """A router does not return experts and weights."""


@dataclass
class _Pending(threading.local):
    """Choices of routers that are running in a thread: log-weights, and the logits of the model."""

    choices: dict[Router, tuple[Tensor, Tensor]] = field(default_factory=dict)


def _replace_choices(
    stack: ExitStack, model: nn.Module, routers: Sequence[Router], pending: _Pending, thread: int | None
) -> None:
    """Hook into the modules of routers until a stack is closed."""
    active, owners = [True], parameter_owners(model)
    stack.callback(active.clear)
    for router in routers:
        for module in tied_routers(model, router, owners):

            def hook(_module: nn.Module, _args: Any, output: Any, router: Router = router) -> Any:
                if not active or not applies(thread) or router not in pending.choices:
                    return None
                return _replaced(router, output, *pending.choices.pop(router))

            # Behind the hook that ends the interception of the logits, which is the first one.
            stack.callback(module.register_forward_hook(hook).remove)


def _replaced(router: Router, output: Any, log_weights: Tensor, logits: Tensor) -> Any:
    """What a router returns, with other experts and their weights."""
    places = _places(output, len(logits))
    if places is None:
        raise _NoChoiceError(
            f"the router {router.name!r} does not return the experts of each token and their weights as tensors, so "
            "others cannot take their place; use a Bayesian router of another kind for this model"
        )
    at_weights, at_experts = places
    weights, experts = output[at_weights], output[at_experts]
    chosen = log_weights.topk(experts.shape[-1], dim=-1)
    # What the family multiplies a score by, which is a constant where weights are not normalised.
    own = at_least_float32(logits).softmax(-1).gather(-1, experts.reshape(len(logits), -1).long())
    scale = at_least_float32(weights).reshape(len(logits), -1).sum(-1, keepdim=True) / own.sum(-1, keepdim=True)
    found = list(output)
    found[at_weights] = (chosen.values.exp() * scale.detach()).to(weights.dtype).view(weights.shape)
    found[at_experts] = chosen.indices.to(experts.dtype).view(experts.shape)
    return found if isinstance(output, list) else tuple(found)


def _places(output: Any, num_tokens: int) -> tuple[int, int] | None:
    """The places of weights and experts `[tokens, K]` in what a router returned; None if there are none."""
    if type(output) not in (tuple, list):
        return None
    tensors = {index: value for index, value in enumerate(output) if isinstance(value, Tensor)}
    for at_experts, experts in tensors.items():
        if experts.dtype not in (torch.int64, torch.int32) or experts.numel() % num_tokens:
            continue
        weights = [i for i, value in tensors.items() if value.is_floating_point() and value.shape == experts.shape]
        if len(weights) == 1:
            return weights[0], at_experts
    return None


class _Greedy(BayesianRouter):
    """The choice that is not random, returned as a random one is."""

    returns_choice = True

    def mean(self, u: Tensor, logits: Tensor) -> Tensor:
        raise NotImplementedError

    sampler = trained = distribution = mean  # type: ignore[assignment]
