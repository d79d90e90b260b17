"""Copies of the containers of a batch, and the detection of writes to its tensors.

A training, validation or test step may consume its batch (`batch.pop("labels")`), and so may `class_logits`. A copy of
the containers, which shares the tensors, is not affected. A write to a tensor is, and torch counts those.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any

from torch import Tensor, nn

from bmoe_lightning.experts.write_counts import write_count


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

    Args:
        batch: The batch, before the code that may write to it.
    """

    def __init__(self, batch: Any) -> None:
        self._seen = [(name, tensor, write_count(tensor)) for name, tensor in _tensors(batch, "batch")]

    def check(self, writer: str) -> None:
        """Check that no tensor was written to.

        Args:
            writer: Name of the code that ran, for the message.

        Raises:
            RuntimeError: If one was; the message names it.
        """
        written = [name for name, tensor, count in self._seen if write_count(tensor) != count]
        if written:
            raise RuntimeError(
                f"{writer} writes in place to {', '.join(written)}, so predictions on this batch would differ from "
                "those on the data; use an out-of-place operation, or clone the tensor first"
            )


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
