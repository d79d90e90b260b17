"""Which errors say that there is not enough memory."""

from __future__ import annotations

import pytest
import torch

from bmoe_lightning.utils.memory import is_out_of_memory


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("XPU out of memory. Tried to allocate 2.00 GiB"),
        torch.cuda.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("MPS backend out of memory (MPS allocated: 9.06 GB)"),
        MemoryError(),
    ],
)
def test_errors_of_allocators(error):
    assert is_out_of_memory(error)


def test_the_error_of_the_cpu_s_allocator():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


@pytest.mark.parametrize("error", [RuntimeError("mat1 and mat2 have other shapes"), ValueError("out of memory")])
def test_other_errors(error):
    assert not is_out_of_memory(error)
