"""Whether two sets of labelled logits are the same in another order, example by example.

Each example is paired with one of the other set: mutual nearest neighbours are, round by round, until none is near
enough. Sums over examples would not notice a few replaced ones, and sorted projections would, in a dense set, find a
partner for any.

In a dense set the neighbours of an example grow with the set, so that the work grows faster than the set. It is
limited: up to `MAX_WORK` coordinates are compared, some 15 seconds of one core, and `_CELLS` distances are in memory at
a time. With four classes that is enough for a million examples in another order, and for 50,000 whose arithmetic was
rounded or that differ.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# In units of the spread between examples.
_IDENTICAL = 1e-5
_TIGHT = 1e-3
# A narrow search first: it leaves few examples for a wide one, whose neighbourhoods are large.
_STAGES = (0.02, 0.1, 1.0)  # of the widest
_JITTER = 1e-8
_CHUNK = 256
_CELLS = 1 << 22  # 32 MiB
MAX_WORK = 1 << 31
"""Maximum number of coordinates that are compared for two sets."""

_SORTED = 16  # coordinates that take as long as an example in the sorting of a round
_FEW = 0.05  # of the examples that are left


@dataclass(frozen=True)
class Pairing:
    """How many examples of two sets are the same.

    Attributes:
        relabelled: Number of examples that have another label. Where the arithmetic differs, similar examples cannot be
            told apart; then it is 0, and they are unpaired.
        unpaired: Number of examples without a partner.
        is_exact: Whether most pairs are equal up to rounding in float32.
        is_complete: Whether all examples were compared; otherwise there are too many (see `MAX_WORK`), and some of the
            unpaired ones may have a partner.
    """

    relabelled: int
    unpaired: int
    is_exact: bool
    is_complete: bool = True


def paired(
    known: Tensor, found: Tensor, known_labels: Tensor, found_labels: Tensor, *, same_example: Tensor, spread: Tensor
) -> Pairing:
    """Pair the examples of two sets that have as many of each label.

    Args:
        known: Coordinates of the examples of one set, `[N, D]` float64.
        found: Those of the other set.
        known_labels: Labels `[N]`.
        found_labels: Those of the other set.
        same_example: Largest distance (in any coordinate) at which two examples may be the same.
        spread: Standard deviation of the coordinates between examples.
    """
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    # Equal examples would all have the same nearest neighbour, and one of them be paired in each round.
    jitter = _JITTER * spread
    known, found = known + jitter * random(*known.shape), found + jitter * random(*found.shape)
    direction = random(known.shape[1])
    direction /= direction.abs().sum()
    pairs = _Pairs(known, found, known @ direction, found @ direction)
    # The narrowest first: it takes no time and leaves few examples, where the arithmetic is the same.
    pairs.add(_IDENTICAL * spread, known_labels, found_labels)
    pairs.add(_TIGHT * spread, known_labels, found_labels)
    is_exact = bool(pairs.distances.median() <= _IDENTICAL * spread)
    relabelled = 0
    if is_exact:
        before = pairs.count
        pairs.add(_TIGHT * spread)
        relabelled = pairs.count - before
    for stage in _STAGES:
        pairs.add(stage * same_example, known_labels, found_labels)
    return Pairing(relabelled, len(known) - pairs.count, is_exact, pairs.is_complete)


class _Pairs:
    """Pairs of examples of two sets, each of which is in at most one pair.

    Attributes:
        distances: Distance of each known example to its partner, `[N]`; infinite without one.
        is_complete: Whether the work was within `MAX_WORK` so far; beyond it no pair is added.
    """

    def __init__(self, known: Tensor, found: Tensor, known_at: Tensor, found_at: Tensor) -> None:
        self._known, self._found = known, found
        self._known_at, self._found_at = known_at, found_at
        self._taken = torch.zeros(len(found), dtype=torch.bool)
        self.distances = torch.full((len(known),), torch.inf, dtype=torch.float64)
        self.is_complete = True
        self._work_left = MAX_WORK

    @property
    def count(self) -> int:
        """Number of pairs."""
        return int(self._taken.sum())

    def add(self, radius: Tensor, known_labels: Tensor | None = None, found_labels: Tensor | None = None) -> None:
        """Pair the examples that are left, if they have the same label and are within a distance."""
        groups = [None] if known_labels is None else known_labels.unique().tolist()
        for group in groups:
            here, there = self.distances.isinf(), ~self._taken
            if group is not None:
                assert known_labels is not None
                assert found_labels is not None
                here, there = here & (known_labels == group), there & (found_labels == group)
            ours, theirs = here.nonzero().squeeze(1), there.nonzero().squeeze(1)
            while len(ours) and len(theirs):
                found = self._mutual(ours, theirs, radius)
                if not self.is_complete:
                    return
                if len(found[0]) < _FEW * len(ours):
                    # What is left of a dense cluster has the same few neighbours.
                    ranked = self._ranked(ours, theirs, radius)
                    found = max(found, ranked, key=lambda pairs: len(pairs[0]))
                one, other, apart = found
                if not len(one):
                    break
                self.distances[ours[one]] = apart
                self._taken[theirs[other]] = True
                ours, theirs = ours[self.distances[ours].isinf()], theirs[~self._taken[theirs]]

    def _ranked(self, ours: Tensor, theirs: Tensor, radius: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Examples of the same rank along the projection, as `_mutual`."""
        count = min(len(ours), len(theirs))
        one, other = self._known_at[ours].argsort()[:count], self._found_at[theirs].argsort()[:count]
        apart = (self._known[ours[one]] - self._found[theirs[other]]).abs().amax(1)
        near = apart <= radius
        return one[near], other[near], apart[near]

    def _mutual(self, ours: Tensor, theirs: Tensor, radius: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mutual nearest neighbours within a distance: positions in `ours` and in `theirs`, and distances."""
        ours_order, theirs_order = self._known_at[ours].argsort(), self._found_at[theirs].argsort()
        known, found = self._known[ours[ours_order]], self._found[theirs[theirs_order]]
        at, there = self._known_at[ours[ours_order]], self._found_at[theirs[theirs_order]]
        # A projection, whose weights sum to at most 1, differs by no more than the largest coordinate.
        begins, ends = torch.searchsorted(there, at - radius), torch.searchsorted(there, at + radius, right=True)
        nearest = torch.full((len(known),), -1)
        apart = torch.full((len(known),), torch.inf, dtype=torch.float64)
        back = torch.full((len(found),), -1)
        back_apart = torch.full((len(found),), torch.inf, dtype=torch.float64)
        starts = torch.arange(0, len(known), _CHUNK)
        stops = (starts + _CHUNK).clamp(max=len(known))
        begins, ends = begins[starts], ends[stops - 1]
        coordinates = known.shape[1] * ((stops - starts) * (ends - begins).clamp(min=0)).sum()
        self._work_left -= int(coordinates) + _SORTED * (len(known) + len(found))
        if self._work_left < 0:
            self.is_complete = False
        chunks = zip(*(part.tolist() for part in (starts, stops, begins, ends)), strict=True)
        for start, stop, begin, end in chunks if self.is_complete else ():
            for low in range(begin, end, _CELLS // _CHUNK):
                high = min(low + _CELLS // _CHUNK, end)
                distances = torch.cdist(known[start:stop], found[low:high], p=torch.inf)
                _improve(apart, nearest, slice(start, stop), *distances.min(1), low)
                _improve(back_apart, back, slice(low, high), *distances.min(0), start)
        here = torch.arange(len(known))
        mutual = (apart <= radius) & (nearest >= 0)
        mutual[mutual.clone()] = back[nearest[mutual]] == here[mutual]
        return ours_order[mutual], theirs_order[nearest[mutual]], apart[mutual]


def _improve(apart: Tensor, nearest: Tensor, at: slice, values: Tensor, index: Tensor, offset: int) -> None:
    """Replace the nearest neighbours found so far, and their distances, by nearer ones."""
    nearer = values < apart[at]
    apart[at] = torch.where(nearer, values, apart[at])
    nearest[at] = torch.where(nearer, index + offset, nearest[at])
