"""What goes into a model and its routers, changed or measured while it runs: token embeddings, and inputs of routers.

A *place* is a number: 0 for the embeddings, and one more than its index for a router.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bmoe_lightning.experts.threads import applies, attached, scope
from bmoe_lightning.experts.tied_weights import parameter_owners
from bmoe_lightning.experts.wrappers.compiled import eager_code
from bmoe_lightning.experts.wrappers.transformers import outermost_pretrained
from bmoe_lightning.routers.interception import tied_routers
from bmoe_lightning.routers.scores import at_least_float32
from bmoe_lightning.routers.streams import row_noise
from bmoe_lightning.routers.token_rows import TokenRows, TokenWatch, watched_tokens
from bmoe_lightning.routers.types import Router

EMBEDDINGS = 0
"""Place of the token embeddings."""

Change = Callable[[int, Tensor, TokenRows], Tensor]
"""`(place, values [R, T, D], rows) -> values [R, T, D]` in the same dtype."""


def place_of(router: Router) -> int:
    """The place of a router's input."""
    return 1 + router.index


def embeddings_of(model: nn.Module, name: str | None = None) -> list[nn.Module]:
    """The modules that embed the tokens of a model.

    Args:
        model: Any module.
        name: Qualified name of the module; None for those that models of transformers name.

    Raises:
        ValueError: If there is no such module, or no name is given for a model that does not tell.
    """
    if name is not None:
        module = dict(model.named_modules()).get(name)
        if module is None:
            raise ValueError(f"{type(model).__name__} has no module {name!r}; name the one that embeds its tokens")
        return [module]
    found = []
    for owner in outermost_pretrained(model):
        try:
            found.append(owner.get_input_embeddings())
        except NotImplementedError:
            found.clear()
            break
    if not found:
        raise ValueError(
            f"{type(model).__name__} does not tell which module embeds its tokens; name it with embeddings='name'"
        )
    return found


@contextmanager
def changed_inputs(
    model: nn.Module, change: Change, *, embeddings: Sequence[nn.Module] = (), routers: Sequence[Router] = ()
) -> Iterator[None]:
    """Pass token embeddings and inputs of routers through a function while a model runs.

    The change of a router's input is local: the experts get what they get without it. A change of the embeddings is
    propagated by the model. Applies in this thread alone, which holds the model's lock meanwhile. The model is restored
    afterwards, also after an exception, and compiled code runs eagerly meanwhile.

    Args:
        model: The model.
        change: The function.
        embeddings: Modules that embed tokens (see `embeddings_of`); empty to leave them as they are.
        routers: Routers whose inputs are changed.

    Raises:
        RuntimeError: If one of them did not run, a router has no input of its width, or the padding is not known; the
            last two are raised from within the model.
    """

    def attach(stack: ExitStack) -> None:
        stack.enter_context(eager_code())
        owners = parameter_owners(model)
        for module in embeddings:
            stack.callback(module.register_forward_hook(changes.of_embeddings()).remove)
        for router in routers:
            for module in tied_routers(model, router, owners):
                hook = changes.of_router(router)
                stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)

    with watched_tokens(model, [router.name for router in routers]) as watch:
        changes = _Changes(change, watch)
        with attached(model, attach, everywhere=False):
            yield
    changes.check(with_embeddings=bool(embeddings), routers=routers)


class _Changes:
    """The hooks that change inputs in this thread, and the places that they have changed."""

    def __init__(self, change: Change, watch: TokenWatch) -> None:
        self._change, self._watch = change, watch
        self._thread = scope()
        self._ran: set[int] = set()

    # In other threads torch may call a hook with other arguments, hence the `rest`.

    def of_embeddings(self) -> Callable[..., Tensor | None]:
        """The hook behind a module that embeds tokens."""

        def hook(_module: nn.Module, _args: Any, *rest: Any) -> Tensor | None:
            return self._changed(EMBEDDINGS, rest[0]) if rest and applies(self._thread) else None

        return hook

    def of_router(self, router: Router) -> Callable[..., Any]:
        """The hook in front of a router."""

        def hook(_module: nn.Module, args: tuple[Any, ...], *rest: Any) -> Any:
            if not rest or not applies(self._thread):
                return None
            return _with_input(router, args, rest[0], lambda value: self._changed(place_of(router), value))

        return hook

    def check(self, *, with_embeddings: bool, routers: Sequence[Router]) -> None:
        """Raise an error if something that should be changed did not run."""
        if with_embeddings and EMBEDDINGS not in self._ran:
            raise RuntimeError(
                "the module that embeds tokens did not run, so its output was not changed; call the model with "
                "input_ids, not with inputs_embeds"
            )
        idle = [router.name for router in routers if place_of(router) not in self._ran]
        if idle:
            raise RuntimeError(
                f"{len(idle)} of {len(routers)} routers did not run as modules, {idle[0]!r} for one; leave them out"
            )

    def _changed(self, place: int, value: Tensor) -> Tensor:
        rows = self._watch.rows(value.shape[:-1].numel())
        self._ran.add(place)
        found = self._change(place, value.reshape(*rows.mask.shape, value.shape[-1]), rows)
        return found.reshape(value.shape)


class RowNoise:
    """Standard normal numbers by place, row of the data and position of the token, whatever the batches are.

    Args:
        seed: Seed, not negative.
    """

    def __init__(self, seed: int) -> None:
        self._seed, self._first = seed, 0

    def begin(self, first: int) -> None:
        """Set the number of the data's row that is the first row of the next calls of the model."""
        self._first = first

    def at(self, place: int, rows: TokenRows, width: int) -> Tensor:
        """The numbers of the tokens of a call, `[R, T, width]` float32.

        Args:
            place: Place in the model.
            rows: Rows of the tokens, R of T.
            width: Numbers of a token.
        """
        positions = rows.positions.cpu()
        count, length = len(positions), int(positions.max()) + 1
        table = row_noise((length, width), seed=self._seed, place=place, rows=range(self._first, self._first + count))
        return table[torch.arange(count).unsqueeze(1), positions]


def add_noise(scales: Mapping[int, float], noise: RowNoise) -> Change:
    """The change that adds Gaussian noise.

    Args:
        scales: Standard deviation of each number by place.
        noise: The noise.
    """

    def noisy(place: int, values: Tensor, rows: TokenRows) -> Tensor:
        added = noise.at(place, rows, values.shape[-1]).to(values.device)
        return (at_least_float32(values) + scales[place] * added).to(values.dtype)

    return noisy


class MeanNorms:
    """The mean L2 norm of the values at each place over real tokens, summed up while a model runs."""

    def __init__(self) -> None:
        self._sums: dict[int, float] = {}
        self._counts: dict[int, int] = {}

    def measure(self, place: int, values: Tensor, rows: TokenRows) -> Tensor:
        """Add the values of a call; a `Change` that leaves them as they are."""
        norms = at_least_float32(values.detach())[rows.mask.to(values.device)].norm(dim=-1).double()
        self._sums[place] = self._sums.get(place, 0.0) + float(norms.sum())
        self._counts[place] = self._counts.get(place, 0) + len(norms)
        return values

    @property
    def found(self) -> dict[int, float]:
        """The mean by place."""
        return {place: total / max(self._counts[place], 1) for place, total in self._sums.items()}


def _with_input(
    router: Router, args: tuple[Any, ...], kwargs: Mapping[str, Any], change: Callable[[Tensor], Tensor]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a router with its input changed: the first tensor of its width."""

    def is_input(value: Any) -> bool:
        return (
            isinstance(value, Tensor) and value.is_floating_point() and value.dim() >= 2
            and value.shape[-1] == router.d_in
        )  # fmt: skip

    for place, value in enumerate(args):
        if is_input(value):
            return (*args[:place], change(value), *args[place + 1 :]), dict(kwargs)
    for name, value in kwargs.items():
        if is_input(value):
            return args, {**kwargs, name: change(value)}
    raise RuntimeError(
        f"the router {router.name!r} was called without a tensor of its width {router.d_in}, so its input is not "
        "known; leave it out"
    )
