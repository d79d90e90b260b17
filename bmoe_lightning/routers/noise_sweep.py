"""How far routes change under noise on the inputs, over a range of its size: the test of routing stability.

The noise is `N(0, (gamma L)^2)` on each number, L the mean L2 norm over real tokens, as in
https://arxiv.org/abs/2509.23830: of the token embeddings, with noise on these, which the model propagates; or of the
inputs of each router, with noise on what this router alone gets without noise, so that no layer sees the noise of
another one. Results are kept by the name of the layer, whatever the batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from bmoe_lightning.experts.discovery import find_expert_layers
from bmoe_lightning.experts.model_state import evaluation_mode
from bmoe_lightning.experts.types import ExpertLayer
from bmoe_lightning.routers.discovery import find_routers
from bmoe_lightning.routers.inputs import (
    EMBEDDINGS,
    Change,
    MeanNorms,
    RowNoise,
    add_noise,
    changed_inputs,
    embeddings_of,
    place_of,
)
from bmoe_lightning.routers.stability import Choices, chance_jaccard, jaccard_of_tokens, recorded_choices
from bmoe_lightning.routers.token_rows import TokenRows
from bmoe_lightning.routers.types import Router
from bmoe_lightning.utils.random_state import unchanged_global_random_states

NoisePlace = Literal["embeddings", "inputs"]
"""Noise on the token embeddings, or on the input of each router alone."""

GAMMAS = (0.001, 0.002, 0.005, 0.007, 0.01, 0.02, 0.05)
"""Sizes of the noise in https://arxiv.org/abs/2509.23830."""

Run = Callable[[Any, int], object]
"""`(batch, draw)`: predicts a batch; random routers repeat their random numbers in equal draws."""


@dataclass(frozen=True)
class Stability:
    """Mean Jaccard indices of the sets of experts of tokens, by the name of the expert layer.

    Attributes:
        embeddings: Under noise on the embeddings, by its size gamma; the router's own random numbers are the same with
            and without noise.
        inputs: Under noise on the input of each router, likewise.
        floor: J0: of two independent draws of the router's random numbers without noise; 1 if it is not random.
        chance: Of two random sets of as many experts.
    """

    embeddings: Mapping[float, Mapping[str, float]]
    inputs: Mapping[float, Mapping[str, float]]
    floor: Mapping[str, float]
    chance: Mapping[str, float]

    def under(self, place: NoisePlace) -> Mapping[float, Mapping[str, float]]:
        """The indices under noise at a place."""
        return self.embeddings if place == "embeddings" else self.inputs


def noise_sweep(
    model: nn.Module,
    run: Run,
    batches: Iterable[Any],
    *,
    seed: int = 0,
    gammas: Sequence[float] = GAMMAS,
    layers: Sequence[ExpertLayer] | None = None,
    routers: Sequence[Router] | None = None,
    embeddings: str | None = None,
) -> Stability:
    """Measure how far the routes of a model change under noise.

    Each batch is run once to measure norms, once without noise, once in another draw, and twice for each gamma. All
    gammas have the same noise, scaled. The inputs of all routers in the passes of one batch are held meanwhile. The
    model and the global random states are restored, also after an exception.

    Args:
        model: The model.
        run: Predicts a batch with it, in one pass or several; with random routers, by their random numbers of a draw.
        batches: Batches, iterated over twice.
        seed: Seed of the noise.
        gammas: Sizes of the noise, not negative.
        layers: Expert layers of the model; None finds them.
        routers: Routers of the model; None finds them.
        embeddings: Name of the module that embeds tokens; None for that of the model's class.

    Raises:
        ValueError: If there is no batch or size of noise, or layers, routers or embeddings are not found.
        RuntimeError: If the padding is not known, or what should be changed does not run.
    """
    if not gammas or any(gamma < 0 for gamma in gammas):
        raise ValueError(f"the sizes of the noise must be numbers of at least 0, at least one, got {tuple(gammas)}")
    layers = find_expert_layers(model) if layers is None else layers
    routers = find_routers(model, layers=layers) if routers is None else routers
    sweep = _Sweep(model, run, layers, routers, embeddings_of(model, embeddings), RowNoise(seed))
    with ExitStack() as stack:
        stack.enter_context(unchanged_global_random_states())
        stack.enter_context(evaluation_mode(model))
        sweep.measure(batches)
        for batch in batches:
            sweep.add(batch, gammas)
    return sweep.result(gammas)


class _Sweep:
    def __init__(
        self,
        model: nn.Module,
        run: Run,
        layers: Sequence[ExpertLayer],
        routers: Sequence[Router],
        embeddings: Sequence[nn.Module],
        noise: RowNoise,
    ) -> None:
        self._model, self._run, self._layers, self._routers = model, run, layers, routers
        self._embeddings, self._noise = embeddings, noise
        self._norms: dict[int, float] = {}
        self._rows = 0
        self._sums: dict[tuple[Any, str], tuple[float, int]] = {}
        self._sizes: dict[str, tuple[int, int]] = {layer.name: (0, 0) for layer in layers}

    def measure(self, batches: Iterable[Any]) -> None:
        """Measure the mean norms at all places."""
        norms, is_empty = MeanNorms(), True
        for batch in batches:
            is_empty = False
            with changed_inputs(self._model, norms.measure, embeddings=self._embeddings, routers=self._routers):
                self._run(batch, 0)
        if is_empty:
            raise ValueError("there is no batch to measure the stability of routes on; pass at least one")
        self._norms = norms.found

    def add(self, batch: Any, gammas: Sequence[float]) -> None:
        """Compare the routes of a batch with those under noise and in another draw."""
        inputs = _Inputs()
        with changed_inputs(self._model, inputs.record, embeddings=self._embeddings, routers=self._routers):
            clean = self._recorded(batch, 0)
        self._noise.begin(self._rows)
        self._rows += inputs.num_rows
        for name, calls in clean.items():
            tokens, chosen = self._sizes[name]
            self._sizes[name] = tokens + sum(map(len, calls)), chosen + sum(int(call.sum()) for call in calls)
        self._compare("floor", clean, self._recorded(batch, 1))
        of_routers = {place_of(router): self._norms[place_of(router)] for router in self._routers}
        for gamma in gammas:
            change = add_noise({EMBEDDINGS: gamma * self._norms[EMBEDDINGS]}, self._noise)
            with changed_inputs(self._model, change, embeddings=self._embeddings):
                self._compare(("embeddings", gamma), clean, self._recorded(batch, 0))
            change = inputs.changed(add_noise({p: gamma * norm for p, norm in of_routers.items()}, self._noise))
            with changed_inputs(self._model, change, routers=self._routers):
                self._compare(("inputs", gamma), clean, self._recorded(batch, 0))

    def result(self, gammas: Sequence[float]) -> Stability:
        """The means over all batches."""

        def means(key: Any) -> dict[str, float]:
            found = {layer.name: self._sums[key, layer.name] for layer in self._layers}
            return {name: total / count for name, (total, count) in found.items()}

        top_k = {name: round(chosen / max(tokens, 1)) for name, (tokens, chosen) in self._sizes.items()}
        return Stability(
            embeddings={gamma: means(("embeddings", gamma)) for gamma in gammas},
            inputs={gamma: means(("inputs", gamma)) for gamma in gammas},
            floor=means("floor"),
            chance={layer.name: chance_jaccard(layer.num_experts, max(top_k[layer.name], 1)) for layer in self._layers},
        )

    def _recorded(self, batch: Any, draw: int) -> Choices:
        with recorded_choices(self._model, self._layers) as choices:
            self._run(batch, draw)
        return choices

    def _compare(self, key: Any, one: Choices, other: Choices) -> None:
        for name, indices in jaccard_of_tokens(one, other).items():
            total, count = self._sums.get((key, name), (0.0, 0))
            self._sums[key, name] = total + float(indices.sum()), count + len(indices)


class _Inputs:
    """The inputs of the routers in the passes of a batch, in the order of their calls, and its number of rows."""

    def __init__(self) -> None:
        self.num_rows = 0
        self._of_places: dict[int, list[Tensor]] = {}

    def record(self, place: int, values: Tensor, rows: TokenRows) -> Tensor:
        """Keep the input of a router; a `Change` that leaves everything as it is."""
        self.num_rows = max(self.num_rows, len(rows.mask))
        if place != EMBEDDINGS:
            self._of_places.setdefault(place, []).append(values.detach())
        return values

    def changed(self, change: Change) -> Change:
        """The change of what a router got when it was recorded, for the same passes once again."""
        left = {place: iter(calls) for place, calls in self._of_places.items()}

        def of_recorded(place: int, _values: Tensor, rows: TokenRows) -> Tensor:
            return change(place, next(left[place]), rows)

        return of_recorded
