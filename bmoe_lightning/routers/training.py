"""Bayesian routers in training: they run inside the model's own forward passes, and their penalty joins the loss.

The penalty of a step is the sum over routers of the mean over real tokens, in nats per token, over all forward passes
of the step that ran with gradients. `beta` multiplies it: with T tokens in an example, the ELBO of one example is
`beta = T` times a mean over tokens, and batch size, padding and the size of the data change nothing.

There are two ways to add it to a loss, with the same gradients:

- `RouterTraining.penalty()`, to be added to the loss;
- `begin(step, penalty_weight=beta)`: the injected logits carry it, so that a backward pass of the loss alone adds its
  gradient. Nothing in the training step changes, there is one backward pass, and DDP sees all gradients in it.

Activations may be recomputed in the backward pass: a router that runs outside of a forward pass of the model gets the
numbers of the call that it repeats.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from bmoe_lightning.experts.threads import in_all_threads
from bmoe_lightning.routers.base import BayesianRouter, TrainedLogits
from bmoe_lightning.routers.choices import injected_routers, top_choice
from bmoe_lightning.routers.draws import StepDraws
from bmoe_lightning.routers.scores import at_least_float32
from bmoe_lightning.routers.token_rows import TokenWatch, watched_tokens
from bmoe_lightning.routers.types import Router

_CHANGED = "changed"


@dataclass
class _Call:
    """One call of a router in a forward pass of a step.

    Attributes:
        number: Its number among the calls with gradients, or among those without.
        has_gradients: Whether the model was called with gradients, whatever checkpoints do within it.
        real: Indices of the real tokens; None if all are.
        num_real: Their number.
        num_tokens: Number of all tokens.
        num_rows: Number of rows, of equally many tokens.
        outline: Mean of the logits over tokens, by which a repeated call is recognised.
        found: What the net made of the tokens.
        repeated: Whether it was repeated, to recompute activations.
    """

    number: int
    has_gradients: bool
    real: Tensor | None
    num_real: int
    num_tokens: int
    num_rows: int
    outline: Tensor
    found: TrainedLogits | None = None
    repeated: bool = False

    @property
    def row_of(self) -> Tensor:
        """The row of each real token, `[num_real]`."""
        places = torch.arange(self.num_tokens, device=self.outline.device) if self.real is None else self.real
        return places // (self.num_tokens // self.num_rows)


@dataclass
class _Step:
    """The calls of the routers in one step, by the index of the router."""

    number: int
    penalty_weight: float
    calls: dict[int, list[_Call]] = field(default_factory=dict)

    @property
    def counted(self) -> dict[int, list[_Call]]:
        """The calls that the penalty is of: without those of a teacher or of a metric, which have no gradients."""
        counted = {index: [call for call in calls if call.has_gradients] for index, calls in self.calls.items()}
        return counted if any(counted.values()) else self.calls

    def num_tokens(self, router: Router) -> int:
        return sum(call.num_real for call in self.counted.get(router.index, ()))


class RouterTraining:
    """The Bayesian routers of a model that is trained. Created by `trained_routers`.

    Args:
        nets: The Bayesian routers.
        watch: Rows of the model's last call.
        seed: Seed of the samples.
    """

    def __init__(self, nets: Sequence[BayesianRouter], watch: TokenWatch, seed: int) -> None:
        self.nets = tuple(net for net in nets if not net.is_still)
        self._watch, self._seed = watch, seed
        self._step: _Step | None = None

    def begin(self, step: int, *, penalty_weight: float = 0.0) -> None:
        """Begin a step: the forward passes up to the next `begin` or `end`, whose backward passes are over by then.

        Forward passes without gradients, such as those of a teacher, get samples and count in nothing.

        Args:
            step: Number of the step, which its random numbers depend on: another one for each batch.
            penalty_weight: What multiplies the penalty in the backward passes of this step, which add its gradient to
                that of the loss; 0 adds none, for losses that contain `penalty()`. Where a loss is scaled, by an
                automatic mixed precision or by the number of accumulated batches, so must this be.
        """
        self._step = _Step(step, penalty_weight)

    def end(self) -> None:
        """End the step: the routers are the model's own until the next one."""
        self._step = None

    def penalty(self, totals: Mapping[int, int] | None = None) -> Tensor:
        """The penalty of the step so far: the sum over routers of the mean over real tokens, a scalar.

        Args:
            totals: Numbers of tokens to divide by, by the index of the router, such as those of all ranks; by default
                those of this step.

        Raises:
            RuntimeError: If no router ran, or they ran without gradients.
        """
        step, calls = self._finished()
        means = []
        for net in self.nets:
            penalties = [call.found.penalty for call in calls.get(net.router.index, ()) if call.found is not None]
            number = step.num_tokens(net.router) if totals is None else totals[net.router.index]
            means += [penalty.sum() / max(number, 1) for penalty in penalties]
        if not means:
            raise RuntimeError(
                "no Bayesian router ran in this step, so it has no penalty; run the model between begin() and penalty()"
            )
        trained = any(parameter.requires_grad for net in self.nets for parameter in net.parameters())
        if torch.is_grad_enabled() and trained and any(self._is_detached(call) for of in calls.values() for call in of):
            raise RuntimeError(
                "the routers ran without gradients, as in reentrant gradient checkpointing, so that penalty() has "
                "none; use gradient_checkpointing_enable(gradient_checkpointing_kwargs={'use_reentrant': False}), or "
                "begin(step, penalty_weight=...)"
            )
        return torch.stack([mean.to(means[0].device) for mean in means]).sum()

    def log_probability(self) -> Tensor | None:
        """The log-probability of all random choices of the step, summed over routers and tokens: of each row, `[R]`.

        Of all rows together, `[1]`, if forward passes had different numbers of rows. None where no choice is random.
        The gradient of an expected loss is that of the loss plus that of
        `log_probability() * (loss.detach() - baseline)`, for any baseline that does not depend on the step's samples.
        """
        _, calls = self._finished()
        found = [call for of_router in calls.values() for call in of_router if call.found is not None]
        sums = [
            found_probability.new_zeros(call.num_rows).index_add(0, call.row_of, found_probability)
            for call in found
            if call.found is not None and (found_probability := call.found.log_probability) is not None
        ]
        if not sums:
            return None
        if len({len(rows) for rows in sums}) > 1:
            sums = [rows.sum(0, keepdim=True) for rows in sums]
        return torch.stack(sums).sum(0)

    def num_tokens(self) -> dict[int, int]:
        """Numbers of real tokens of the step so far, by the index of the router."""
        step, _ = self._finished()
        return {net.router.index: step.num_tokens(net.router) for net in self.nets}

    def statistics(self) -> dict[str, dict[int, float]]:
        """Means over real tokens of what the routers report of the step, by name and the index of the router.

        `changed` is the share of tokens whose K largest logits are those of other experts than without noise.
        """
        means = self.statistic_means()
        return {name: {index: float(mean) for index, mean in of.items()} for name, of in means.items()}

    def statistic_means(self) -> dict[str, dict[int, Tensor]]:
        """The same as float64 tensors, without waiting for their device."""
        _, calls = self._finished()
        parts: dict[str, dict[int, list[Tensor]]] = {}
        for index, of_router in calls.items():
            for call in of_router:
                for name, values in (call.found.statistics if call.found is not None else {}).items():
                    parts.setdefault(name, {}).setdefault(index, []).append(values)
        found = {name: {index: torch.cat(values) for index, values in of.items()} for name, of in parts.items()}
        return {name: {i: all_.double().mean() for i, all_ in of.items() if len(all_)} for name, of in found.items()}

    def _finished(self) -> tuple[_Step, Mapping[int, list[_Call]]]:
        if self._step is None:
            raise RuntimeError("no training step is running; call begin(step) before the forward pass")
        return self._step, self._step.counted

    @staticmethod
    def _is_detached(call: _Call) -> bool:
        found = call.found
        return found is not None and not (found.logits.requires_grad or found.penalty.requires_grad)

    def _logits(self, net: BayesianRouter, u: Tensor, logits: Tensor) -> Tensor:
        step = self._step
        if step is None:
            return logits
        calls = step.calls.setdefault(net.router.index, [])
        is_first = self._watch.is_running
        if is_first:
            calls.append(self._begun(calls, logits))
        call = calls[-1] if is_first else _repeated(net.router, calls, logits)
        own = logits if call.real is None else logits[call.real]
        draws = StepDraws(
            net.router, call.num_real, seed=self._seed, step=step.number, call=call.number, device=logits.device
        )
        found = net.trained(u if call.real is None else u[call.real], own, draws)
        if is_first:
            call.found = _with_changes(net.router, found, own)
        sampled = found.logits if net.returns_choice else found.logits.to(logits.dtype)
        if step.penalty_weight:
            sampled = _WithPenalty.apply(
                sampled, found.penalty.sum(), lambda: step.penalty_weight / max(step.num_tokens(net.router), 1)
            )
        if call.real is None:
            return sampled
        # Padding keeps the router's own logits, or its own choice.
        base = top_choice(net.router, logits).to(sampled) if net.returns_choice else logits
        return base.index_put((call.real,), sampled)

    def _begun(self, calls: Sequence[_Call], logits: Tensor) -> _Call:
        rows = self._watch.rows(len(logits))
        real = None if rows.real is None else rows.real.to(logits.device)
        num_real = len(logits) if real is None else len(real)
        with_gradients = self._watch.has_graph
        number = sum(call.has_gradients == with_gradients for call in calls)
        return _Call(number, with_gradients, real, num_real, len(logits), len(rows.mask), _outline(logits))


def _outline(logits: Tensor) -> Tensor:
    return at_least_float32(logits.detach()).mean(0)


def _repeated(router: Router, calls: Sequence[_Call], logits: Tensor) -> _Call:
    """The call that a router repeats in a backward pass: of those whose logits are nearest, the last."""
    same = [call for call in calls if call.has_gradients and call.num_tokens == len(logits)]
    if not same:
        raise RuntimeError(
            f"the router {router.name!r} ran outside of a forward pass of the model, and not to repeat one of this "
            "step; call begin(step) after the backward pass of the step before, and run the model by calling it"
        )
    if len(same) == 1:
        return same[0]
    outline = _outline(logits)
    distances = torch.stack([(call.outline - outline).abs().sum() for call in same]).tolist()
    nearest = [call for call, distance in zip(same, distances, strict=True) if distance == min(distances)]
    # A backward pass goes through the last forward pass first.
    found = next((call for call in reversed(nearest) if not call.repeated), nearest[-1])
    found.repeated = True
    return found


def _with_changes(router: Router, found: TrainedLogits, logits: Tensor) -> TrainedLogits:
    """What a net found, with the share of tokens whose experts change among its statistics."""
    if router.top_k is None:
        return found
    with torch.no_grad():
        before, after = (values.topk(router.top_k, dim=-1).indices for values in (logits, found.logits))
        same = (before.sort(-1).values == after.sort(-1).values).all(-1)
    return replace(found, statistics={**found.statistics, _CHANGED: (~same).double()})


class _WithPenalty(torch.autograd.Function):
    """The identity on logits, whose backward pass gives the penalty its gradient."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, penalty: Tensor, weight: Callable[[], float]) -> Tensor:
        ctx.weight, ctx.like = weight, penalty.detach()
        return logits.view_as(logits)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        return gradients[0], torch.full_like(ctx.like, ctx.weight()), None


@contextmanager
def trained_routers(
    model: nn.Module, nets: Sequence[BayesianRouter], *, seed: int, everywhere: bool = True
) -> Iterator[RouterTraining]:
    """Run Bayesian routers in the training steps of a model: one sample of each token's logits in each forward pass.

    Outside of the steps (see `RouterTraining.begin`) the routers are the model's own. The context may span many steps;
    backward passes belong into it.

    Args:
        model: The model.
        nets: Bayesian routers of some of its routers.
        seed: Seed of the samples, not negative; another one on each rank.
        everywhere: Whether this applies in all threads, see `intercepted_routers`; False for compiled models, whose
            code then runs eagerly.

    Raises:
        ValueError: If the model is compiled, and this should apply everywhere.
    """
    with ExitStack() as stack:
        with in_all_threads() if everywhere else nullcontext():
            watch = stack.enter_context(watched_tokens(model, [net.router.name for net in nets]))
        training = RouterTraining(nets, watch, seed)
        stack.enter_context(injected_routers(model, training.nets, training._logits, everywhere=everywhere))
        stack.callback(training.end)
        yield training
