"""Bayesian routers: the trained part of a router whose logits, weights or choices are random.

They stand beside the model and not in it: its state dict, modules and weights stay as they are. `trained_routers` runs
them in training and `bmoe_lightning.routers.prediction` afterwards. A kind is one file with one class.

Shapes: router input `u [tokens, D]` and the trained router's logits `[tokens, N]`, in the dtypes in which the model has
them; S samples. Logits are sampled in float32 at least, and cast back by whoever puts them into the model: in less,
noise would be rounded, and ties change the choice.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from bmoe_lightning.experts.fingerprint import module_fingerprint
from bmoe_lightning.experts.fsdp import full_tensor
from bmoe_lightning.routers.distribution import LogitDistribution
from bmoe_lightning.routers.draws import Draws
from bmoe_lightning.routers.scores import at_least_float32, mean_scores
from bmoe_lightning.routers.types import Router

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

RouterState = Mapping[str, Tensor]
"""Tensors by `{index of the router}.{name}`."""


@dataclass(frozen=True)
class TrainedLogits:
    """What a Bayesian router makes of the tokens of a training step, for one sample.

    Attributes:
        logits: The logits that are put into the model, `[tokens, N]`, differentiable in the trained part.
        penalty: What each token adds to the loss, in nats, `[tokens]`: a Kullback-Leibler divergence, or zero.
        log_probability: Log-probability of what was chosen at random, where no gradient passes through the choice
            itself, `[tokens]`; None where the logits are differentiable.
        statistics: Detached numbers of each token that are averaged and reported, each `[tokens]`.
    """

    logits: Tensor
    penalty: Tensor
    log_probability: Tensor | None = None
    statistics: Mapping[str, Tensor] = field(default_factory=dict)


Alarm = Callable[[Mapping[str, float]], "str | None"]
"""`(means of one more training step by name) -> how the noise has collapsed by now, or None`; see `TrainedLogits`."""


class BayesianRouter(nn.Module, ABC):
    """The trained part of one router.

    Args:
        router: The router.
    """

    numbers_per_token: ClassVar[bool] = True
    """Whether samples use numbers of each token's own alone, so that copies of a batch for several samples are computed
    together; otherwise `samples` is called for each copy."""

    not_negative: ClassVar[tuple[str, ...]] = ()
    """Names of parameters and buffers that have no negative numbers."""

    returns_choice: bool = False
    """Whether samples are logarithms of the weights of the chosen experts, `-inf` for the others, which take the place
    of what the router's module returns. Otherwise they are logits, by which its own code chooses and weights."""

    def __init__(self, router: Router) -> None:
        super().__init__()
        self.router = router

    draws_choice: ClassVar[bool] = False
    """Whether experts are chosen at random, so that `choice_ways` has to say how the choice gets into the model."""

    @property
    def is_still(self) -> bool:
        """Whether it changes no logits, so that the model's own tensor is used, and nothing is trained."""
        return False

    @property
    def floats_per_token(self) -> int:
        """Number of floats that one sample of one token takes, by which samples are computed in chunks."""
        return self.router.num_experts

    @abstractmethod
    def mean(self, u: Tensor, logits: Tensor) -> Tensor:
        """The logits without noise, `[tokens, N]`: the router that predicts with no sample."""

    @abstractmethod
    def sampler(self, u: Tensor, logits: Tensor) -> Callable[[Draws], Tensor]:
        """A function that samples the logits, `[S, tokens, N]` in float32 at least, called for chunks of samples.

        What does not depend on the sample is computed once. S is that of the numbers of the `Draws`.
        """

    def samples(self, u: Tensor, logits: Tensor, draws: Draws) -> Tensor:
        """Samples of the logits, `[S, tokens, N]`; see `sampler`."""
        return self.sampler(u, logits)(draws)

    def averaged(self, u: Tensor, logits: Tensor, chunks: Iterable[Draws]) -> Tensor:
        """What takes the place of one sample where scores are averaged over samples, `[tokens, N]`.

        That is logits whose scores are the average; or the logarithm of the average weights, see `returns_choice`.

        Args:
            u: Input of the router.
            logits: Its logits.
            chunks: Random numbers of at least one sample, which are computed in these chunks.

        Raises:
            ValueError: If the router's scores are neither a softmax nor a sigmoid.
        """
        sampled = map(self.sampler(u, logits), chunks)
        if not self.returns_choice:
            return mean_scores(sampled, self.router.score or "other").logits(self.mean(u, logits))
        sums, counts = zip(*((chunk.logsumexp(0), len(chunk)) for chunk in sampled), strict=True)
        return torch.stack(sums).logsumexp(0) - math.log(sum(counts))

    @abstractmethod
    def trained(self, u: Tensor, logits: Tensor, draws: Draws) -> TrainedLogits:
        """One sample for training, and its penalty."""

    @abstractmethod
    def distribution(self, u: Tensor, logits: Tensor) -> LogitDistribution | None:
        """The first two moments of the logits; None where the choice alone is random."""

    def gate_logits(self, u: Tensor, logits: Tensor) -> Tensor:
        """The logits whose scores tell how sure the router is, `[tokens, N]`; by default the mean."""
        return self.mean(u, logits)

    def check_router(self) -> None:
        """Check that the router, which is probed by now, can be one of this kind.

        Raises:
            ValueError: If it cannot.
        """

    def collapse_alarm(self) -> Alarm | None:
        """What notices in training that the noise has collapsed, for one run; None if it cannot."""
        return None

    def hyperparameters(self) -> dict[str, float]:
        """Numbers to report that do not depend on tokens."""
        return {}


def router_state(nets: Sequence[BayesianRouter]) -> dict[str, Tensor]:
    """The parameters and buffers of Bayesian routers, detached, on the CPU. A collective, if they are sharded.

    Args:
        nets: The routers.
    """
    return {
        f"{net.router.index}.{name}": full_tensor(value).cpu().clone()
        for net in nets
        for name, value in net.state_dict().items()
    }


def check_router_state(nets: Sequence[BayesianRouter], state: RouterState) -> None:
    """Check that a state has the tensors of these routers, in their shapes, and no others.

    Args:
        nets: Routers of the same kind and options as those of the state.
        state: State of `router_state`.

    Raises:
        ValueError: If an entry is missing, one is left over, or has another shape.
    """
    expected = {f"{net.router.index}.{name}": value.shape for net in nets for name, value in net.state_dict().items()}
    found = {name: value.shape for name, value in state.items()}
    if expected != found:
        differing = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        raise ValueError(
            f"the stored routers differ from those that the options describe in {len(differing)} of {len(expected)} "
            f"tensors, {differing[0]!r} for one; use the options that they were trained with"
        )


def load_router_state(nets: Sequence[BayesianRouter], state: RouterState) -> None:
    """Load parameters and buffers in the dtype of the state.

    Args:
        nets: Routers of the same kind and options as those of the state.
        state: State of `router_state`.

    Raises:
        ValueError: If an entry is missing, one is left over, or has another shape.
    """
    check_router_state(nets, state)
    for net in nets:
        prefix = f"{net.router.index}."
        own = {name: state[prefix + name].clone() for name in net.state_dict()}
        net.load_state_dict(own, assign=True)


def router_fingerprint(model: nn.Module, routers: Sequence[Router], dtype: torch.dtype = torch.float32) -> Tensor:
    """A hash of the weights of routers, `[32]` uint8; see `weight_fingerprint`. A collective, if they are sharded.

    Args:
        model: The model.
        routers: Some of its routers.
        dtype: Dtype to which the weights are rounded.
    """
    digests = [module_fingerprint(model.get_submodule(router.name), model=model, dtype=dtype) for router in routers]
    digest = hashlib.sha256("\n".join(digests).encode()).digest()
    return torch.frombuffer(bytearray(digest), dtype=torch.uint8)


def rounded_router_fingerprints(model: nn.Module, routers: Sequence[Router]) -> Tensor:
    """Hashes of the weights of routers as they are and rounded to bfloat16 and float16, `[3, 32]` uint8.

    Copies of a model in two of these dtypes share one of them, if one is the other, rounded. A collective, if the
    weights are sharded.

    Args:
        model: The model.
        routers: Some of its routers.
    """
    return torch.stack([router_fingerprint(model, routers, dtype) for dtype in _DTYPES])


def check_router_weights(model: nn.Module, routers: Sequence[Router], fingerprint: Tensor) -> None:
    """Refuse Bayesian routers that were trained beside other weights.

    Args:
        model: The model.
        routers: The routers.
        fingerprint: Their hash when the Bayesian routers were trained, see `router_fingerprint`; or the hashes of
            `rounded_router_fingerprints`, of which one must be the same.

    Raises:
        ValueError: If the weights of the routers are others.
    """
    found = (router_fingerprint if fingerprint.dim() == 1 else rounded_router_fingerprints)(model, routers)
    if not bool((found == fingerprint.cpu()).all(-1).any()):
        raise ValueError(
            f"the weights of the routers of {type(model).__name__} are not those beside which the Bayesian routers "
            "were trained; load the checkpoint that they belong to, or train them again"
        )


def hidden_width(d_in: int, hidden: int | None) -> int:
    """The width H of a hidden layer: D / 4 by default, as in the papers."""
    return max(1, d_in // 4) if hidden is None else hidden


def drawn_matrix(d_out: int, d_in: int, *, seed: int, router: Router, dtype: torch.dtype) -> nn.Parameter:
    """A weight `[d_out, d_in]` as `nn.Linear` draws it, from a generator of its own.

    Args:
        d_out: Number of outputs.
        d_in: Number of inputs.
        seed: Seed.
        router: The router that it belongs to, each of which gets other numbers.
        dtype: Its dtype.
    """
    generator = torch.Generator().manual_seed((seed << 16) + router.index)
    weight = torch.empty(d_out, d_in, dtype=torch.float32, device="cpu")
    nn.init.kaiming_uniform_(weight, a=math.sqrt(5), generator=generator)
    return nn.Parameter(weight.to(dtype))


def zeros(*shape: int, dtype: torch.dtype) -> nn.Parameter:
    """A parameter of zeros."""
    return nn.Parameter(torch.zeros(*shape, dtype=dtype, device="cpu"))


def trained_dtype(model: nn.Module, router: Router) -> torch.dtype:
    """The dtype of the trained part beside a router: that of its weight, and float32 at least."""
    floating = [p.dtype for p in model.get_submodule(router.name).parameters() if p.is_floating_point()]
    return at_least_float32(torch.empty(0, dtype=floating[0] if floating else torch.float32)).dtype
