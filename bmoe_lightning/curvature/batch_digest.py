"""A digest of the batches of a pass, which detects other batches and another order of them."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bmoe_lightning.experts.counted_batch import CountedBatch, plain_batch
from bmoe_lightning.utils.safetensors_io import tensor_bytes


def extended_digest(digest: str, batch: Any) -> str:
    """The digest of some batches and one more.

    It depends on the dtypes, shapes and values of all tensors and arrays, and on all strings, bytes, numbers and
    `None`s in nested mappings, sequences and dataclasses. A `CountedBatch` of which all examples count has the digest
    of the batch itself.

    Args:
        digest: Hexadecimal digest of the batches before; empty if there are none.
        batch: The next batch.

    Raises:
        ValueError: If the batch contains any other type, or no values.
    """
    running = hashlib.sha256(digest.encode())
    counts_whole = isinstance(batch, CountedBatch) and batch.num_counted == batch.size
    if not _add(running, plain_batch(batch) if counts_whole else batch):
        raise ValueError(
            f"a batch of type {type(batch).__name__} contains no values, so a curvature pass over such batches cannot "
            "be resumed. Pass batches of tensors, or disable the curvature checkpoint."
        )
    return running.hexdigest()


def _add(running: Any, value: Any) -> bool:
    """Add a value to a digest; returns whether it contains anything but containers and `None`."""
    if isinstance(value, Tensor) and value.layout is torch.strided and not (value.is_nested or value.is_quantized):
        running.update(f"{value.dtype} {tuple(value.shape)};".encode())
        running.update(tensor_bytes(value))
        return True
    if isinstance(value, np.ndarray) and value.dtype.hasobject:
        return _add(running, value.tolist())
    if isinstance(value, (np.ndarray, np.generic)):
        running.update(f"{value.dtype} {value.shape};".encode())
        running.update(np.ascontiguousarray(value).tobytes())
        return True
    if value is None or isinstance(value, (str, bytes, int, float)):
        plain = repr(value).encode()
        running.update(f"{type(value).__name__} {len(plain)};".encode() + plain)
        return value is not None
    if isinstance(value, Mapping):
        items = [item for pair in value.items() for item in pair]
    elif isinstance(value, Sequence):
        items = list(value)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        items = [item for field in dataclasses.fields(value) for item in (field.name, getattr(value, field.name))]
    else:
        raise ValueError(
            f"a batch contains a value of type {type(value).__name__}, which cannot be compared when a curvature "
            "pass resumes. Pass batches of tensors, arrays, numbers and strings in mappings, sequences and "
            "dataclasses, or disable the curvature checkpoint."
        )
    running.update(f"{_kind(value)} {len(items)};".encode())
    found = [_add(running, item) for item in items]
    return any(found)


def _kind(container: Any) -> str:
    return "mapping" if isinstance(container, Mapping) else "sequence" if isinstance(container, Sequence) else "object"
