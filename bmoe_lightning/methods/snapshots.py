"""Snapshots: what was trained, and nothing else, as one safetensors file; and a model that borrows one for a while."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor, nn

from bmoe_lightning.experts.fsdp import local_part, reshard
from bmoe_lightning.utils.safetensors_io import opened_safetensors, write_safetensors

FORMAT = "bmoe_lightning.snapshot"
VERSION = "1"


def save_snapshot(path: str | Path, named_parameters: Mapping[str, Tensor]) -> None:
    """Write tensors by name; an existing file is replaced only at the end.

    Args:
        path: the file.
        named_parameters: qualified name, as in `model.named_parameters()`, to tensor; whole ones.

    Raises:
        ValueError: if there is nothing to save.
        OSError: if it cannot be written; what was there before stays.
    """
    if not named_parameters:
        raise ValueError("a snapshot without tensors says nothing; pass the trained parameters by name")
    write_safetensors(path, named_parameters, {FORMAT: VERSION})


def apply_snapshot(model: nn.Module, path: str | Path) -> None:
    """Put a snapshot's tensors into a model's parameters for good; `swapped_weights` does so for a while.

    The parameters stay the same objects. One tensor at a time is read. Of weights that FSDP2 has sharded, each process
    takes its part.

    Args:
        model: the model whose parameters the snapshot names.
        path: the snapshot.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no snapshot, or names parameters that the model lacks or has in another shape; the model
            has not been touched then.
        OSError: if it cannot be read to its end; what was read until then is in the model.
    """
    for parameter, value in _with_parameters(model, path):
        local_part(parameter).take(value)


def snapshot_shapes(path: str | Path) -> dict[str, tuple[int, ...]]:
    """Read names and shapes of a snapshot's tensors from its header.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is truncated, foreign, or of another version.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no snapshot at {path}")
    with opened_safetensors(path) as file:
        metadata = file.metadata() or {}
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118  (no mapping)
    if FORMAT not in metadata:
        raise ValueError(f"{path} is a safetensors file, but no snapshot of bmoe_lightning")
    if metadata[FORMAT] != VERSION:
        raise ValueError(
            f"{path} has version {metadata[FORMAT]} of the snapshot format; this release reads version {VERSION}"
        )
    return shapes


@contextmanager
def swapped_weights(model: nn.Module, path: str | Path) -> Iterator[None]:
    """Put a snapshot's tensors into a model's parameters for a while.

    The parameters stay the same objects. Their own values wait on the CPU and come back bit for bit, also after an
    exception. One tensor at a time is read and moved. Of weights that FSDP2 has sharded, each process takes its part.

    Args:
        model: the model whose parameters the snapshot names.
        path: the snapshot.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no snapshot, or names parameters that the model lacks or has in another shape; the model
            has not been touched then.
    """
    originals: list[tuple[nn.Parameter, Tensor]] = []
    try:
        for parameter, value in _with_parameters(model, path):
            part = local_part(parameter)
            originals.append((parameter, part.values.to("cpu", copy=True)))
            part.take(value)
        yield
    finally:
        reshard(model)
        for parameter, original in originals:
            local_part(parameter).take(original)  # the model may have been moved


def _with_parameters(model: nn.Module, path: str | Path) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """The parameters that a snapshot names, with its tensors; nothing is read before all of them fit."""
    shapes = snapshot_shapes(path)
    reshard(model)
    parameters = dict(model.named_parameters())
    _check_fit(path, shapes, parameters)
    with opened_safetensors(path) as file:
        for name in shapes:
            yield parameters[name], file.get_tensor(name)


def _check_fit(path: str | Path, shapes: Mapping[str, tuple[int, ...]], parameters: Mapping[str, nn.Parameter]) -> None:
    unknown = [name for name in shapes if name not in parameters]
    if unknown:
        raise ValueError(
            f"{path} holds {len(unknown)} tensors that this model does not have, the first is {unknown[0]!r}; load it "
            "into the module whose parameters it was saved from"
        )
    for name, shape in shapes.items():
        own = tuple(parameters[name].shape)
        if shape != own:
            raise ValueError(
                f"{path} holds {name!r} with shape {shape}, the model has {own}: it was saved from a model of another "
                "size"
            )
