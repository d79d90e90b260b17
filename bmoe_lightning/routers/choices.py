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
from itertools import takewhile
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from bmoe_lightning.experts.threads import applies, scope
from bmoe_lightning.experts.tied_weights import parameter_owners
from bmoe_lightning.experts.wrappers.compiled import eager_code
from bmoe_lightning.routers.base import BayesianRouter
from bmoe_lightning.routers.interception import intercepted_routers, tied_routers
from bmoe_lightning.routers.probe import cyclic_ranks, relative_distance
from bmoe_lightning.routers.scores import at_least_float32
from bmoe_lightning.routers.selection import restrict
from bmoe_lightning.routers.types import Router

Logits = Callable[[BayesianRouter, Tensor, Tensor], Tensor]
"""`(net, input u [tokens, D], logits [tokens, N]) -> [tokens, N]` in any dtype: logits, or log-weights of a choice."""

# Relative distance of the outputs of blocks with the same choice: routers compute scores in float32 at least, and
# weights that differ by that rounding may be rounded apart to half precision, where blocks compute in it.
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

    Measured: with logits that are nearly equal, each MoE block has to compute the same where the logits of the experts
    that are not chosen are `-inf`. Or else it has to compute the same where the experts that the model chooses itself,
    with their weights, are put back.

    Args:
        model: The model.
        routers: Its routers, probed.
        run: Runs the model on one batch, in evaluation mode and without gradients; called four times.

    Raises:
        ValueError: If neither is exact: weights depend on the experts that are not chosen, and a router does not return
            its choice.
    """

    def flat(_router: Router, _u: Tensor, logits: Tensor) -> Tensor:
        return _nearly_equal(logits)

    def flat_choice(router: Router, _u: Tensor, logits: Tensor) -> Tensor:
        return top_choice(router, _nearly_equal(logits)).to(logits.dtype)

    # Of compiled code, the run without an interception would not call the hooks of the blocks.
    with eager_code(), _Blocks(model, routers, run) as blocks:
        with intercepted_routers(model, routers, flat):
            expected = blocks.outputs()
        with intercepted_routers(model, routers, flat_choice):
            told = blocks.outputs()
        if blocks.are_equal(told, expected):
            return False
        nets = [_Greedy(router) for router in routers]
        plain, told = blocks.outputs(), []
        with (
            suppress(_NoChoiceError),
            injected_routers(model, nets, lambda net, _u, logits: top_choice(net.router, logits)),
        ):
            told = blocks.outputs()
    if not blocks.are_equal(told, plain):
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


def _nearly_equal(logits: Tensor) -> Tensor:
    """Distinct logits between -.5 and .5: a softmax over all experts gives the K largest little more than K / N."""
    return (0.5 - cyclic_ranks(logits) / logits.shape[1]).to(logits.dtype)


class _Blocks:
    """Records what MoE blocks compute in this thread: what holds a router and its experts, and the model as a whole.

    Weights of experts that differ show there, and hardly in the model's logits.

    Args:
        model: The model.
        routers: Its routers.
        run: Runs the model on one batch.
    """

    def __init__(self, model: nn.Module, routers: Sequence[Router], run: Callable[[], Tensor]) -> None:
        names = dict.fromkeys(_common_parent(router.name, router.experts) for router in routers)
        self._modules = [model.get_submodule(name) for name in names if name]
        self._run = run
        self._thread = scope()
        self._found: list[Tensor] = []
        self._is_half = False

    def __enter__(self) -> Self:
        self._handles = [module.register_forward_hook(self._keep) for module in self._modules]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def outputs(self) -> list[Tensor]:
        """The outputs of one run."""
        self._found = []
        output = self._run()
        return [*self._found, output]

    def are_equal(self, ones: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
        """Whether two runs have given the same up to rounding."""
        tolerance = _HALF_ROUNDING if self._is_half else _ROUNDING
        return len(ones) == len(others) and all(
            relative_distance(one, other) <= tolerance for one, other in zip(ones, others, strict=True)
        )

    def _keep(self, _module: nn.Module, _args: object, output: object) -> None:
        if not applies(self._thread):
            return
        value = next((value for value in tree_leaves(output) if isinstance(value, Tensor)), None)
        if value is not None and value.is_floating_point():
            self._is_half |= value.dtype in _HALF or torch.is_autocast_enabled(value.device.type)
            self._found.append(value.detach().clone())


def _common_parent(one: str, other: str) -> str:
    """Name of the innermost module that holds two modules; empty for the model itself."""
    pairs = zip(one.split("."), other.split("."), strict=False)
    return ".".join(a for a, _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


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
