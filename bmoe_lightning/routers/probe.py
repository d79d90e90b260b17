"""What a router does with its logits, measured on one batch: how many experts it chooses, and by which score.

Families differ in the code between logits and experts, so it is run and not read. The logits of all routers are
replaced by patterns, and the model's output and the experts of each token are compared:

- the logits as they are: the output must be bitwise the same;
- whole numbers, and the same plus 126: a softmax does not see the difference, and both are exact in every dtype;
- two patterns of large logits, at all of which a sigmoid is exactly one;
- a pattern, with other experts preferred in the second half of the tokens: these experts must change, which those of a
  hash do not, and the experts of the first half must not, which they do where experts choose their tokens. Where only
  the number of tokens of each expert is known, all tokens prefer the same experts, and the numbers must change.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from bmoe_lightning.experts.discovery import find_expert_layers
from bmoe_lightning.experts.interception import intercepted_layers
from bmoe_lightning.experts.model_state import evaluation_mode
from bmoe_lightning.experts.types import ExpertLayer
from bmoe_lightning.experts.wrappers.compiled import eager_code
from bmoe_lightning.experts.wrappers.names import unwrapped
from bmoe_lightning.routers.interception import RouterError, intercepted_routers
from bmoe_lightning.routers.types import Router, Score
from bmoe_lightning.utils.random_state import unchanged_global_random_states

_ROUNDING = 1e-6

Pattern = Callable[[Tensor], Tensor]
"""Ranks of the experts of each token `[tokens, N]`, from 0 -> logits in float32."""


@dataclass(frozen=True)
class ProbedRouter:
    """What the probe of a router found.

    Attributes:
        router: The router, with `top_k` and `score` as measured.
        refusal: Why it is not supported, in one line; None if it is.
    """

    router: Router
    refusal: str | None = None


def probe_routers(
    model: nn.Module,
    routers: Sequence[Router],
    run: Callable[[], Tensor],
    *,
    layers: Sequence[ExpertLayer] | None = None,
) -> list[Router]:
    """Measure `top_k` and `score` of routers on one batch, and check that their logits can be replaced.

    Args:
        model: The model.
        routers: Routers as `find_routers` returned them.
        run: Runs the model on one batch, such as `lambda: class_logits(model, batch)[0]`; called about ten times,
            in evaluation mode and without gradients.
        layers: Expert layers of the model, those of the routers among them; None finds them.

    Returns:
        The routers, with `top_k` and `score`. `top_k` stays None where experts drop tokens, so that it cannot be
        counted.

    Raises:
        ValueError: If a router is not supported: it makes its logits by no linear map or several, never runs, or the
            choice of experts does not follow its logits token by token (hash routing, or experts that choose tokens).
    """
    probed = examine_routers(model, routers, run, layers=layers)
    refused = [found for found in probed if found.refusal is not None]
    if refused:
        name, reason = refused[0].router.name, refused[0].refusal
        raise ValueError(
            f"{len(refused)} of the {len(routers)} routers of {type(model).__name__} are not supported, {name!r} since "
            f"{reason}; name the others with find_routers(model, routers='pattern')"
        )
    return [found.router for found in probed]


def examine_routers(
    model: nn.Module,
    routers: Sequence[Router],
    run: Callable[[], Tensor],
    *,
    layers: Sequence[ExpertLayer] | None = None,
) -> list[ProbedRouter]:
    """As `probe_routers`, with the reason of each router that is not supported."""
    layers = find_expert_layers(model) if layers is None else layers
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(unchanged_global_random_states())
        stack.enter_context(evaluation_mode(model))
        stack.enter_context(eager_code())
        probe = _Probe(model, layers, run)
        refusals = probe.intercepted(routers)
        able = [router for router in routers if router not in refusals]
        refusals |= probe.choices(able)
        able = [router for router in able if router not in refusals]
        scores = probe.scores(able)
    return [
        ProbedRouter(router, refusals[router])
        if router in refusals
        else ProbedRouter(replace(router, top_k=probe.top_k[router], score=scores[router]))
        for router in routers
    ]


class _Probe:
    """The passes through a model whose routers are probed."""

    def __init__(self, model: nn.Module, layers: Sequence[ExpertLayer], run: Callable[[], Tensor]) -> None:
        self._model, self._layers, self._run = model, layers, run
        self._plain = run()
        # What the model's own arithmetic changes from run to run, on some GPUs.
        self._noise = relative_distance(run(), self._plain)
        self.top_k: dict[Router, int | None] = {}

    def intercepted(self, routers: Sequence[Router]) -> dict[Router, str]:
        """The routers whose logits cannot be replaced, and why."""
        refusals: dict[Router, str] = {}
        able = list(routers)
        while able:
            ran: set[str] = set()

            def same(router: Router, _u: Tensor, logits: Tensor, ran: set[str] = ran) -> Tensor:
                ran.add(router.name)
                return logits.clone()

            try:
                with intercepted_routers(self._model, able, same):
                    output = self._run()
            except RouterError as error:
                kind = type(self._model.get_submodule(error.router.name))
                alike = [router for router in able if type(self._model.get_submodule(router.name)) is kind]
                refusals |= dict.fromkeys(alike, str(error))
                able = [router for router in able if router not in refusals]
                continue
            idle = [router for router in able if router.name not in ran]
            refusals |= dict.fromkeys(idle, "it does not run on this batch, or not as a module")
            if not torch.equal(output, self._plain) and self._distance(output, self._plain) > 0:
                refusals |= dict.fromkeys(able, "the model changes where a router's logits are replaced by equal ones")
            break
        return refusals

    def choices(self, routers: Sequence[Router]) -> dict[Router, str]:
        """Find `top_k`; returns the routers whose logits do not choose the experts, and why."""
        if not routers:
            return {}
        before, _ = self._tapped(routers)
        unknown = {name for name, calls in before.items() if any(call.tokens is None for call in calls)}
        # Where only the number of tokens of each expert is known, all get other logits.
        moved_from = {router: 0.0 if router.experts in unknown else 0.5 for router in routers}
        after, tokens = self._tapped(routers, moved_from)
        refusals = {}
        for router in routers:
            calls, moved, seen = before.get(router.experts, []), after.get(router.experts, []), tokens[router.name]
            if not calls:
                refusals[router] = "no token reached its experts on this batch"
                continue
            top_k = self.top_k[router] = _most_experts(calls, sum(seen))
            is_dense = top_k == router.num_experts and bool((_counts(calls) == sum(seen)).all())
            if not is_dense and (refusal := _refusal(calls, moved, seen)) is not None:
                refusals[router] = refusal
        return refusals

    def scores(self, routers: Sequence[Router]) -> dict[Router, Score]:
        """The score of each router."""
        if not routers:
            return {}
        score = self._score(routers, routers)
        if score != "other":
            return dict.fromkeys(routers, score)
        kinds: dict[type[nn.Module], list[Router]] = {}
        for router in routers:
            kinds.setdefault(type(unwrapped(self._model.get_submodule(router.name))), []).append(router)
        scores = {kind: self._score(of_kind, routers) for kind, of_kind in kinds.items()} if len(kinds) > 1 else {}
        return {router: scores.get(kind, score) for kind, of_kind in kinds.items() for router in of_kind}

    def _score(self, changed: Sequence[Router], routers: Sequence[Router]) -> Score:
        """The score of some routers, the logits of the others being held fixed."""

        def output(pattern: Pattern) -> Tensor:
            def by_pattern(router: Router, _u: Tensor, logits: Tensor) -> Tensor:
                return (pattern if router in changed else _small)(cyclic_ranks(logits)).to(logits.dtype)

            with intercepted_routers(self._model, routers, by_pattern):
                return self._run()

        if self._distance(output(_near), output(_far)) <= _ROUNDING:
            return "softmax"
        return "sigmoid" if self._distance(output(_large), output(_larger)) <= _ROUNDING else "other"

    def _tapped(
        self, routers: Sequence[Router], moved_from: Mapping[Router, float] | None = None
    ) -> tuple[dict[str, list[_Chosen]], dict[str, list[int]]]:
        """The experts of the tokens in each expert layer, and the number of tokens in each call of each router.

        The logits are the pattern, and others behind a part of the tokens, where that is given.
        """
        tokens: dict[str, list[int]] = {router.name: [] for router in routers}

        def by_pattern(router: Router, _u: Tensor, logits: Tensor) -> Tensor:
            ranks = cyclic_ranks(logits)
            tokens[router.name].append(len(ranks))
            if moved_from is not None:
                start = int(moved_from[router] * len(ranks))
                ranks[start:] = ranks[:1].roll(logits.shape[1] // 2, dims=1)  # the same experts for all
            return _small(ranks).to(logits.dtype)

        taps = [_ChoiceTap() for _ in self._layers]
        with (
            intercepted_layers(self._model, self._layers, taps=taps),
            intercepted_routers(self._model, routers, by_pattern),
        ):
            self._run()
        return {layer.module_name: tap.calls for layer, tap in zip(self._layers, taps, strict=True)}, tokens

    def _distance(self, one: Tensor, other: Tensor) -> float:
        """The relative distance of two outputs, zero if it is within the model's own noise."""
        distance = relative_distance(one, other)
        return distance if distance > 10 * self._noise else 0.0


@dataclass(frozen=True)
class _Chosen:
    """The slots of one call of an experts module: experts and tokens `[S]`; tokens None if they are not known."""

    experts: Tensor
    tokens: Tensor | None
    num_tokens: int


@dataclass
class _ChoiceTap:
    """Collects the experts of tokens; not those that get zeros, where a router sends every token to all experts."""

    calls: list[_Chosen] = field(default_factory=list)

    def record(
        self, inputs: Tensor, experts: Tensor, outputs: Tensor, tokens: Tensor | None, num_tokens: int
    ) -> Tensor:
        if tokens is None:
            self.calls.append(_Chosen(experts, None, num_tokens))
        else:
            used = inputs.ne(0).any(1)
            self.calls.append(_Chosen(experts[used], tokens[used], num_tokens))
        return outputs


def _most_experts(calls: Sequence[_Chosen], num_tokens: int) -> int | None:
    """The largest number of experts of a token; None if that cannot be told, since experts drop tokens."""
    tokens = [call.tokens for call in calls if call.tokens is not None]
    if tokens and len(tokens) == len(calls):
        return max(int(at.bincount().max()) if len(at) else 0 for at in tokens) or None
    slots = sum(len(call.experts) for call in calls)
    return slots // num_tokens if slots and slots % num_tokens == 0 else None


def _refusal(calls: Sequence[_Chosen], moved: Sequence[_Chosen], num_tokens: Sequence[int]) -> str | None:
    """The reason why the choice of experts is not by a token's own logits; None if it is.

    Args:
        calls: The experts of the tokens.
        moved: Those where the second half of the tokens got other logits, or all where tokens are not known.
        num_tokens: Number of tokens in each call of the router.
    """
    if any(call.tokens is None for call in (*calls, *moved)):
        if torch.equal(_counts(calls), _counts(moved)):
            return (
                "the number of tokens of each expert does not depend on its logits, as in hash routing, or where "
                "experts choose tokens"
            )
        return None
    pairs = [(_slots(one), _slots(other)) for one, other in zip(calls, moved, strict=True)]
    if all(one == other for one, other in pairs):
        return "the choice of experts does not depend on its logits, as in hash routing"
    if [call.num_tokens for call in calls] == list(num_tokens):
        for (one, other), tokens in zip(pairs, num_tokens, strict=True):
            if any(token < tokens // 2 for token, _ in one ^ other):
                return "a token's experts depend on the logits of other tokens, as where experts choose tokens"
    return None


def _slots(call: _Chosen) -> set[tuple[int, int]]:
    """The pairs of token and expert."""
    assert call.tokens is not None
    return set(zip(call.tokens.tolist(), call.experts.tolist(), strict=True))


def _counts(calls: Sequence[_Chosen]) -> Tensor:
    """The number of slots of each expert that has any."""
    return torch.cat([call.experts.cpu() for call in calls]).bincount() if calls else torch.empty(0)


def relative_distance(one: Tensor, other: Tensor) -> float:
    """Relative distance of two outputs, over the values that are finite in the second: absent classes are not.

    Args:
        one: Output `[B, K]`.
        other: Another one, whose size is the unit.
    """
    present = other.isfinite()
    difference = torch.linalg.vector_norm((one - other)[present].double())
    if difference == 0:
        return 0.0
    return float((difference / torch.linalg.vector_norm(other[present].double())).nan_to_num(torch.inf))


def cyclic_ranks(logits: Tensor) -> Tensor:
    """The rank of each expert, from 0, `[tokens, N]` int64; every token prefers another expert than the one before.

    Args:
        logits: `[tokens, N]`, of which the shape and the device count.
    """
    tokens, num_experts = logits.shape
    experts = torch.arange(num_experts, device=logits.device)
    return (experts + torch.arange(tokens, device=logits.device).unsqueeze(1)) % num_experts


def _small(ranks: Tensor) -> Tensor:
    """Logits between -2 and 2, so far apart that a bias of a score does not choose, and exact in bfloat16."""
    step = 2.0 ** math.floor(math.log2(8 / ranks.shape[1]))
    return (2 - step * ranks).clamp(min=-2)


def _near(ranks: Tensor) -> Tensor:
    """Whole numbers between -2 and 2."""
    return 2.0 - ranks.clamp(max=4)


def _far(ranks: Tensor) -> Tensor:
    """The same around 126, exact in bfloat16; relative differences are small there."""
    return _near(ranks) + 126


# A sigmoid is exactly one above 37 in float64. The weights of scores that grow further differ by several percent.
def _large(ranks: Tensor) -> Tensor:
    return 64 + 64 * 2.0**-ranks


def _larger(ranks: Tensor) -> Tensor:
    return 192 + 16 * 2.0**-ranks
