"""Bayesian routers as a module, which whoever trains a model holds beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from bmoe_lightning.experts.fsdp import has_shards
from bmoe_lightning.experts.model_state import evaluation_mode
from bmoe_lightning.routers.base import BayesianRouter, trained_dtype
from bmoe_lightning.routers.choices import choice_ways
from bmoe_lightning.routers.discovery import find_routers
from bmoe_lightning.routers.gaps import NUM_BINS, count_gaps, median_gap
from bmoe_lightning.routers.gaussian import GaussianRouter
from bmoe_lightning.routers.interception import intercepted_routers
from bmoe_lightning.routers.kinds import RouterOptions
from bmoe_lightning.routers.probe import probe_routers
from bmoe_lightning.routers.token_rows import watched_tokens
from bmoe_lightning.routers.types import Router
from bmoe_lightning.utils.random_state import unchanged_global_random_states

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class BayesianRouters(nn.ModuleList):
    """Bayesian routers beside some routers of a model, on the devices of these.

    Their weights stay in float32 at least when the module that holds them is cast to half precision. Gaussians have the
    prior scale 0, and the model is itself, until `set_scales` gives them one.

    Args:
        model: The model.
        options: Their options.
        layers: Indices of the routers, by their order; all of them if there are none.

    Attributes:
        options: Their options.
        is_probed: Whether `probe` has run.
        prior: Scale of the prior and its unit, where a training has set them.

    Raises:
        ValueError: If the model has no such routers, or one of them cannot be of the kind.
    """

    def __init__(self, model: nn.Module, options: RouterOptions, layers: Sequence[int] = ()) -> None:
        super().__init__()
        self.options = options
        self.is_probed = False
        self.prior: tuple[float, str] | None = None
        for router in _chosen(find_routers(model), layers):
            net = options.make(router, trained_dtype(model, router))
            weight = next(model.get_submodule(router.name).parameters(), None)
            self.append(net if weight is None or weight.is_meta else net.to(weight.device))

    @property
    def nets(self) -> tuple[BayesianRouter, ...]:
        """The Bayesian routers."""
        return tuple(net for net in self if isinstance(net, BayesianRouter))

    @property
    def lacks_scale(self) -> bool:
        """Whether the scale of a prior is not set yet."""
        return any(net.is_still for net in self.nets)

    def probe(self, model: nn.Module, run: Callable[[], Tensor]) -> None:
        """Probe the routers, once, and find out how drawn experts get into the model.

        Args:
            model: The model.
            run: Runs the model on one batch; see `probe_routers`.

        Raises:
            ValueError: If a router is not supported, or cannot be of the kind.
        """
        if self.is_probed:
            return
        probed = probe_routers(model, [net.router for net in self.nets], run)
        for net, router in zip(self.nets, probed, strict=True):
            net.router = router
            net.check_router()
        drawn = [net for net in self.nets if net.draws_choice]
        if drawn:
            with torch.no_grad(), unchanged_global_random_states(), evaluation_mode(model):
                way = choice_ways(model, [net.router for net in drawn], run)
            for net in drawn:
                net.returns_choice = way
        self.is_probed = True

    def gap_counts(self, model: nn.Module, run: Callable[[], Tensor]) -> Tensor:
        """Count the gaps of each router on one batch, padding aside, `[L, NUM_BINS]` int64; see `count_gaps`.

        Args:
            model: The model; its routers are probed.
            run: Runs the model on one batch.
        """
        places = {net.router: place for place, net in enumerate(self.nets)}
        counts = torch.zeros(len(places), NUM_BINS, dtype=torch.int64)

        def count(router: Router, _u: Tensor, logits: Tensor) -> Tensor:
            real = watch.rows(len(logits)).real
            counts[places[router]] += count_gaps(logits if real is None else logits[real.to(logits.device)], router)
            return logits

        with (
            torch.no_grad(),
            unchanged_global_random_states(),
            evaluation_mode(model),
            watched_tokens(model, [router.name for router in places]) as watch,
            intercepted_routers(model, list(places), count),
        ):
            run()
        return counts

    def set_scales(self, scales: Sequence[float]) -> None:
        """Set the scale of the prior of each Gaussian that has none.

        Args:
            scales: A number for each router.

        Raises:
            ValueError: If one of them is zero.
        """
        for net, scale in zip(self.nets, scales, strict=True):
            if not isinstance(net, GaussianRouter) or not net.is_still:
                continue
            if not scale > 0:
                raise ValueError(
                    f"at half of the tokens or more, the K-th and the next largest logit of the router "
                    f"{net.router.name!r} are equal, so that their gap gives its noise no scale; pass prior_unit='one'"
                )
            net.rescale(scale)

    def shard(self, mesh: DeviceMesh) -> None:
        """Shard the routers with FSDP2, unless they are: each is gathered while one of its methods runs in the model.

        Args:
            mesh: A device mesh with one dimension.
        """
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

        for net in self.nets:
            if not has_shards(net):
                fully_shard(net, mesh=mesh, reshard_after_forward=False)
                for name in ("trained", "samples", "mean"):
                    register_fsdp_forward_method(net, name)

    def _apply(self, fn: Callable[[Any], Any], recurse: bool = True) -> Self:
        def unrounded(tensor: Tensor) -> Tensor:
            found: Tensor = fn(tensor)
            is_rounded = found.is_floating_point() and torch.finfo(found.dtype).bits < torch.finfo(tensor.dtype).bits
            return tensor.to(found.device) if is_rounded else found

        return super()._apply(unrounded, recurse)


def _chosen(routers: Sequence[Router], layers: Sequence[int]) -> list[Router]:
    unknown = sorted(set(layers) - {router.index for router in routers})
    if unknown:
        raise ValueError(
            f"layers names the router {unknown[0]}, and the model has the routers 0 to {len(routers) - 1}; name some "
            "of these"
        )
    return [router for router in routers if not layers or router.index in layers]


def checked_layers(layers: Sequence[int]) -> tuple[int, ...]:
    """Indices of routers, each once; none for all of them.

    Args:
        layers: The argument of that name.

    Raises:
        ValueError: If it is no sequence of whole numbers, or names a router twice.
    """
    if not isinstance(layers, Sequence) or any(type(layer) is not int for layer in layers):
        raise ValueError(f"layers must be a sequence of indices of routers, got {layers!r}; pass such as layers=[1]")
    twice = [layer for layer in layers if layers.count(layer) > 1]
    if twice:
        raise ValueError(f"layers names the router {twice[0]} twice; name each router once")
    return tuple(layers)


def attached_routers(module: nn.Module) -> BayesianRouters | None:
    """The Bayesian routers that a module holds beside its model; None if there are none.

    Args:
        module: Such as a LightningModule.

    Raises:
        ValueError: If there are several.
    """
    found = [inner for inner in module.modules() if isinstance(inner, BayesianRouters)]
    if len(found) > 1:
        raise ValueError(
            f"{type(module).__name__} holds {len(found)} sets of Bayesian routers, so it is unknown which ones are "
            "meant; hold one set beside a model"
        )
    return found[0] if found else None


def median_gaps(counts: Tensor) -> list[float]:
    """The median gap of each router.

    Args:
        counts: `[L, NUM_BINS]`, see `BayesianRouters.gap_counts`; counts of several batches and ranks add up.
    """
    return [median_gap(of_router) for of_router in counts]
