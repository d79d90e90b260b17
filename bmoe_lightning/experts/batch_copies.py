"""Copies of the containers of a batch, and the detection of writes to its tensors.

A training, validation or test step may consume its batch (`batch.pop("labels")`), and so may `class_logits`. A copy of
the containers, which shares the tensors, is not affected. A write to a tensor is. Torch counts those, except for writes
through `.data` or through memory that is shared with NumPy, for which values are compared.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

from bmoe_lightning.experts.write_counts import write_count

_COMPARED_BYTES = 1 << 17


def copied_containers(batch: Any, tensor: Callable[[Tensor], Tensor] = lambda values: values) -> Any:
    """Copy nested lists, tuples, mappings, dataclasses and objects with attributes; tensors are shared.

    Args:
        batch: The batch. A mapping that cannot be changed stays the same object, as does anything else.
        tensor: Function that is applied to every tensor.
    """
    if isinstance(batch, Tensor):
        return tensor(batch)
    if isinstance(batch, MutableMapping):
        copied = copy.copy(batch)  # not a new one: the constructor may not take a mapping
        for key, value in batch.items():
            copied[key] = copied_containers(value, tensor)
        return copied
    if isinstance(batch, (list, tuple)):
        values = [copied_containers(value, tensor) for value in batch]
        if hasattr(batch, "_fields"):
            return type(batch)(*values)
        return type(batch)(values)
    attributes = _attributes(batch)
    if attributes:
        copied = copy.copy(batch)
        for name, value in attributes.items():
            object.__setattr__(copied, name, copied_containers(value, tensor))  # a dataclass may be frozen
        return copied
    return batch


class WriteCheck:
    """Detects writes to the tensors of a batch.

    Counted writes are all found. Of others, those that change a value that is compared: all values of a small tensor
    (ids, labels and masks), and evenly spaced ones of a large tensor.

    Args:
        batch: The batch, before the code that may write to it.
        synchronise: Whether values on an accelerator are compared too, which waits for it.
    """

    def __init__(self, batch: Any, *, synchronise: bool = False) -> None:
        self._seen = [
            (name, tensor, write_count(tensor), _compared(tensor, synchronise=synchronise, copies=True))
            for name, tensor in _tensors(batch, "batch")
        ]
        self._synchronise = synchronise

    def check(self, writer: str) -> None:
        """Check that no tensor was written to.

        Args:
            writer: Name of the code that ran, for the message.

        Raises:
            RuntimeError: If one was; the message names it.
        """
        written = [
            name
            for name, tensor, count, values in self._seen
            if write_count(tensor) != count or self._differs(tensor, values)
        ]
        if written:
            raise RuntimeError(
                f"{writer} writes in place to {', '.join(written)}, so predictions on this batch would differ from "
                "those on the data; use an out-of-place operation, or clone the tensor first"
            )

    def _differs(self, tensor: Tensor, before: Tensor | None) -> bool:
        now = None if before is None else _compared(tensor, synchronise=self._synchronise)
        if before is None or now is None:
            return False
        if now.shape != before.shape:
            return True
        return not torch.equal(now, before) and not bool(((now == before) | (now.isnan() & before.isnan())).all())


def _compared(tensor: Tensor, *, synchronise: bool, copies: bool = False) -> Tensor | None:
    """The values of a tensor that are compared; None if they cannot be, or only with another device."""
    if type(tensor) is not Tensor or tensor.layout != torch.strided or tensor.is_quantized:
        return None
    if tensor.device.type != "cpu" and (not synchronise or tensor.is_meta):
        return None
    values = tensor.detach()
    if values.nbytes > _COMPARED_BYTES:
        if not values.is_contiguous():
            return None
        values = values.view(-1)[:: 1 + values.nbytes // _COMPARED_BYTES]
    return values.clone() if copies else values


def _tensors(batch: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(batch, Tensor):
        yield name, batch
    elif isinstance(batch, Mapping):
        for key, value in batch.items():
            yield from _tensors(value, f"{name}[{key!r}]")
    elif isinstance(batch, (list, tuple)):
        for index, value in enumerate(batch):
            yield from _tensors(value, f"{name}[{index}]")
    else:
        for key, value in _attributes(batch).items():
            yield from _tensors(value, f"{name}.{key}")


def _attributes(batch: Any) -> dict[str, Any]:
    """The attributes of a batch object that are tensors, containers or dataclasses."""
    if isinstance(batch, (type, nn.Module)) or callable(batch):
        return {}
    kinds = (Tensor, Mapping, list, tuple)
    if dataclasses.is_dataclass(batch):
        names = [field.name for field in dataclasses.fields(batch)]
        given = {name: getattr(batch, name) for name in names if hasattr(batch, name)}
    else:
        given = dict(getattr(batch, "__dict__", {}))
    return {name: value for name, value in given.items() if isinstance(value, kinds) or dataclasses.is_dataclass(value)}
