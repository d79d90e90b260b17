"""Peak memory of phases."""

from __future__ import annotations

import torch

from recipes.common.peak_memory import peak_memory

CPU = torch.device("cpu")


def test_a_phase_includes_what_is_left_of_earlier_ones_and_not_their_peak():
    known = torch.zeros(1000)
    with peak_memory(CPU, [known]) as memory:
        large, lasting = torch.zeros(2500), torch.ones(500)
        assert memory.peak == 4 * 3000
        del large
        memory.restart()
        assert memory.peak == 4 * 500
        small = known[:10] + torch.zeros(10)
    assert memory.peak == 4 * 520
    assert len(small) + len(lasting) == 510
