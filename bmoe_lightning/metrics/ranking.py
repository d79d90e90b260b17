"""Examples in groups of equal confidence, which is how ties are averaged whatever the order of the data."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Groups:
    """Examples grouped by a score.

    Attributes:
        index: Group of each example, `[N]`; group 0 has the lowest score.
        number: Number of groups G.
    """

    index: Tensor
    number: int

    def sums(self, values: Tensor) -> Tensor:
        """Sums over each group of values `[R, N]`: `[R, G]`."""
        return values.new_zeros(len(values), self.number).index_add_(1, self.index, values)


def grouped(score: Tensor) -> Groups:
    """Group examples of equal score, in ascending order.

    Args:
        score: `[N]`.
    """
    unique, index = torch.unique(score, return_inverse=True)
    return Groups(index, len(unique))


def before(sums: Tensor) -> Tensor:
    """Sums over all groups before each: `[R, G]`.

    Args:
        sums: Sums over groups, `[R, G]`.
    """
    return sums.cumsum(1) - sums
