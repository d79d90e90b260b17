"""Copies of the containers of a batch, and the detection of writes to its tensors.

A training, validation or test step may consume its batch (`batch.pop("labels")`), and so may `class_logits`. A copy of
the containers, which shares tensors and arrays, is not affected. A write to a tensor is. Torch counts those, except for
writes through `.data` or through memory that is shared with NumPy, for which values are compared.
"""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from bmoe_lightning.experts.write_counts import write_count

_COMPARED_BYTES = 1 << 17
# A batch may refer to a tokenizer or a data set: an attribute is looked at this deep, and at this many entries of each
# container, for a tensor that makes it a part of the batch.
_DEPTH = 4
_ENTRIES = 8


def copied_containers(batch: Any, tensor: Callable[[Tensor], Tensor] = lambda values: values) -> Any:
    """Copy nested lists, tuples, mappings, dataclasses and objects that hold tensors; tensors and arrays are shared.

    Args:
        batch: The batch. A mapping that cannot be changed stays the same object, as does anything else.
        tensor: Function that is applied to every tensor.
    """
    return _copied(batch, tensor, {})


def _copied(batch: Any, tensor: Callable[[Tensor], Tensor], copies: dict[int, Any]) -> Any:
    """Copy containers; `copies` holds the copies of objects by the object's id, since parts may refer to the whole."""
    if isinstance(batch, Tensor):
        return tensor(batch)
    if isinstance(batch, MutableMapping):
        copied = copy.copy(batch)  # not a new one: the constructor may not take a mapping
        for key, value in batch.items():
            copied[key] = _copied(value, tensor, copies)
        return copied
    if isinstance(batch, (list, tuple)):
        values = [_copied(value, tensor, copies) for value in batch]
        if hasattr(batch, "_fields"):
            return type(batch)(*values)
        return type(batch)(values)
    if id(batch) in copies:
        return copies[id(batch)]
    attributes = _attributes(batch)
    if attributes:
        copied = copies[id(batch)] = copy.copy(batch)
        for name, value in attributes.items():
            object.__setattr__(copied, name, _copied(value, tensor, copies))  # a dataclass may be frozen
        return copied
    return batch


def batch_rows(batch: Any, rows: Sequence[int], size: int) -> Any:
    """Some rows of a batch: of every tensor and array with an entry for each, and of lists that hold no tensors.

    Args:
        batch: The batch.
        rows: Indices of the rows.
        size: Number of rows of the batch.

    Returns:
        A copy of the batch's containers; None if nothing in it has rows.
    """
    found: list[Any] = []

    def cut(values: Any) -> Any:
        if not values.ndim or len(values) != size:
            return values
        found.append(values)
        return values[list(rows)]

    def part(value: Any) -> Any:
        if isinstance(value, np.ndarray):
            return cut(value)
        if isinstance(value, MutableMapping):
            copied = copy.copy(value)
            for key, entry in value.items():
                copied[key] = part(entry)
            return copied
        if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
            if len(value) == size and not any(isinstance(entry, (Tensor, np.ndarray)) for entry in value):
                found.append(value)
                return type(value)(value[row] for row in rows)
            return type(value)(part(entry) for entry in value)
        return copied_containers(value, cut)

    chosen = part(batch)
    return chosen if found else None


class _Seen(NamedTuple):
    name: str
    tensor: Tensor
    writes: int
    values: Tensor | None
    all_values: bool


class WriteCheck:
    """Detects writes to the tensors and arrays of a batch.

    All values of a small tensor (ids, labels and masks) are compared, and evenly spaced ones of a large tensor, whose
    counted writes are all found besides.

    Args:
        batch: The batch, before the code that may write to it.
        synchronise: Whether values on an accelerator are compared too, which waits for it.
    """

    def __init__(self, batch: Any, *, synchronise: bool = False) -> None:
        self._seen = [
            _Seen(name, tensor, write_count(tensor), *_compared(tensor, synchronise=synchronise, copies=True))
            for name, tensor in _tensors(batch, "batch", set())
        ]
        self._synchronise = synchronise

    def check(self, writer: str) -> None:
        """Check that no tensor was written to.

        Args:
            writer: Name of the code that ran, for the message.

        Raises:
            RuntimeError: If one was; the message names it.
        """
        written = [seen.name for seen in self._seen if self._is_written(seen)]
        if written:
            raise RuntimeError(
                f"{writer} writes in place to {', '.join(written)}, so predictions on this batch would differ from "
                "those on the data; use an out-of-place operation, or clone the tensor first"
            )

    def _is_written(self, seen: _Seen) -> bool:
        now, _ = _compared(seen.tensor, synchronise=self._synchronise)
        if seen.values is not None and now is not None and _differ(seen.values, now):
            return True
        return not seen.all_values and write_count(seen.tensor) != seen.writes


def _differ(before: Tensor, now: Tensor) -> bool:
    if now.shape != before.shape or now.dtype != before.dtype:
        return True
    return not torch.equal(now, before) and not bool(((now == before) | (now.isnan() & before.isnan())).all())


def _compared(tensor: Tensor, *, synchronise: bool, copies: bool = False) -> tuple[Tensor | None, bool]:
    """The values of a tensor that are compared, None if they cannot be, and whether these are all of its values."""
    if type(tensor) is not Tensor or tensor.layout != torch.strided or tensor.is_quantized:
        return None, False
    if tensor.device.type != "cpu" and (not synchronise or tensor.is_meta):
        return None, False
    values = tensor.detach()
    some = values.nbytes > _COMPARED_BYTES
    if some:
        if not values.is_contiguous():
            return None, False
        values = values.view(-1)[:: 1 + values.nbytes // _COMPARED_BYTES]
    return (values.clone() if copies else values), not some


def _tensors(batch: Any, name: str, seen: set[int]) -> Iterator[tuple[str, Tensor]]:
    """The tensors and arrays of a batch by name."""
    if isinstance(batch, Tensor):
        yield name, batch
    elif isinstance(batch, np.ndarray):
        values = _memory(batch)
        if values is not None:
            yield name, values
    elif isinstance(batch, Mapping):
        for key, value in batch.items():
            yield from _tensors(value, f"{name}[{key!r}]", seen)
    elif isinstance(batch, (list, tuple)):
        for index, value in enumerate(batch):
            yield from _tensors(value, f"{name}[{index}]", seen)
    elif id(batch) not in seen:
        seen.add(id(batch))
        for key, value in _attributes(batch).items():
            yield from _tensors(value, f"{name}.{key}", seen)


def _memory(array: np.ndarray) -> Tensor | None:
    """The values of an array, or their bytes if torch has no such type; shared with the array. None for references."""
    if array.dtype.hasobject:
        return None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        try:
            return torch.from_numpy(array)
        except (TypeError, ValueError):  # text or dates; negative strides
            contiguous = array.flags.c_contiguous or array.flags.f_contiguous
            return torch.from_numpy(array.ravel(order="K").view(np.uint8)) if contiguous and array.size else None


def _attributes(batch: Any) -> dict[str, Any]:
    """The attributes of a batch object that are containers or hold tensors."""
    kinds = (Tensor, np.ndarray, Mapping, list, tuple)
    return {
        name: value
        for name, value in _own_attributes(batch).items()
        if isinstance(value, kinds) or dataclasses.is_dataclass(value) or _holds_tensors(value, _DEPTH)
    }


def _holds_tensors(value: Any, depth: int) -> bool:
    if isinstance(value, (Tensor, np.ndarray)):
        return True
    if not depth:
        return False
    parts: Iterable[Any]
    if isinstance(value, Mapping):
        parts = islice(value.values(), _ENTRIES)
    elif isinstance(value, (list, tuple)):
        parts = value[:_ENTRIES]
    else:
        parts = _own_attributes(value).values()
    return any(_holds_tensors(part, depth - 1) for part in parts)


def _own_attributes(value: Any) -> dict[str, Any]:
    """An object's attributes; of a module, a class or a function none, which are no part of a batch."""
    if isinstance(value, (type, nn.Module)) or callable(value):
        return {}
    if dataclasses.is_dataclass(value):
        names: list[str] = [field.name for field in dataclasses.fields(value)]
        return {name: getattr(value, name) for name in names if hasattr(value, name)}
    slots = [name for parent in type(value).__mro__ for name in _slots(parent) if hasattr(value, name)]
    return {**getattr(value, "__dict__", {}), **{name: getattr(value, name) for name in slots}}


def _slots(parent: type) -> tuple[str, ...]:
    """The names of a class' own slots that can be read under these names."""
    slots = vars(parent).get("__slots__", ())
    names = (slots,) if isinstance(slots, str) else tuple(slots)
    return tuple(name for name in names if not name.startswith("__"))
