"""Snapshots: the trained parameters in one safetensors file, and context managers that swap them into a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from bmoe_lightning.experts.fsdp import local_part, reshard
from bmoe_lightning.experts.replaced_parameters import is_replaceable, replaced_parameters, replacement
from bmoe_lightning.experts.threads import model_lock
from bmoe_lightning.utils.safetensors_io import (
    OpenedTensorFile,
    file_origin,
    opened_tensor_file,
    remove_tensor_file,
    write_tensor_file,
)

FORMAT = "snapshot"
VERSION = 1


@dataclass(frozen=True)
class SnapshotInfo:
    """Contents of a snapshot's header.

    Attributes:
        shapes: Shape of each parameter by qualified name.
        fit: Id of the fit that the file belongs to; empty for none.
        digest: SHA-256 digest of the content, as `save_snapshot` returned it.
        weights: Fingerprint of all weights of the model that the parameters are of; empty if unknown.
    """

    shapes: dict[str, tuple[int, ...]]
    fit: str
    digest: str
    weights: str = ""


def save_snapshot(path: str | Path, named_parameters: Mapping[str, Tensor], fit: str = "", weights: str = "") -> str:
    """Write parameters by name atomically.

    Args:
        path: Target path; its folder is created if missing.
        named_parameters: Unsharded parameters by qualified name, as in `model.named_parameters()`.
        fit: Id of the fit that the file belongs to.
        weights: Fingerprint of all weights of the model, by which a later process recognises it.

    Returns:
        The SHA-256 digest of the content.

    Raises:
        ValueError: If there are no parameters.
        OSError: If the file cannot be written; an existing file is unchanged.
    """
    if not named_parameters:
        raise ValueError("there are no parameters to save; pass the trained parameters by name")
    description = {"weights": weights} if weights else {}
    return write_tensor_file(path, named_parameters, format=FORMAT, version=VERSION, description=description, fit=fit)


def snapshot_info(path: str | Path) -> SnapshotInfo:
    """Read a snapshot's header.

    Raises:
        FileNotFoundError: If the file does not exist.
        OSError: If it cannot be read, such as a `PermissionError`.
        ValueError: If it is not a snapshot, is truncated, or has another format version.
    """
    with opened_snapshot(path) as file:
        return SnapshotInfo(file.shapes, file.fit, file.digest, str(file.description.get("weights", "")))


def fit_of(paths: Iterable[Path]) -> str | None:
    """The id of the fit that the first of some snapshots belongs to that belongs to one; None if there is none."""
    origins = (file_origin(path) for path in paths)
    return next((origin.fit for origin in origins if origin is not None and origin.fit), None)


def check_snapshots(paths: Iterable[Path], fit_id: str) -> None:
    """Check that snapshots belong to a fit, or to none.

    Raises:
        ValueError: If one belongs to another fit.
    """
    for path in paths:
        found = fit_of([path])
        if found is not None and found != fit_id:
            raise ValueError(
                f"the snapshot {path} belongs to another fit ({found[:8]}) than this one ({fit_id[:8]}); load both "
                "with one load_fit, or fit again with these snapshots and without fit_id="
            )


def verify_snapshot(path: str | Path) -> None:
    """Verify every tensor of a snapshot, one at a time.

    Raises:
        FileNotFoundError: If the file does not exist.
        OSError: If it cannot be read, such as a `PermissionError`.
        ValueError: If it is not a snapshot, is truncated or damaged, or has another format version.
    """
    with opened_snapshot(path) as file:
        for name in file.shapes:
            file.read(name)


def read_snapshot(path: str | Path) -> dict[str, Tensor]:
    """Read all tensors of a snapshot by qualified parameter name, on the CPU.

    Raises:
        FileNotFoundError: If the file does not exist.
        OSError: If it cannot be read, such as a `PermissionError`.
        ValueError: If it is not a snapshot, is truncated or damaged, or has another format version.
    """
    with opened_snapshot(path) as file:
        return {name: file.read(name) for name in file.shapes}


def remove_snapshot(path: str | Path) -> bool:
    """Remove a file only if it is a snapshot.

    Returns:
        Whether it was removed.
    """
    return remove_tensor_file(path, format=FORMAT)


def apply_snapshot(model: nn.Module, path: str | Path) -> None:
    """Copy a snapshot's tensors into a model's parameters.

    The copy is in place. Tensors are read one at a time. With FSDP2 each rank copies its shard. The file is verified
    before the first parameter changes.

    Args:
        model: Model whose parameters the snapshot names.
        path: Path of the snapshot.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If it is not a snapshot, is damaged, contains non-finite values, or names parameters that the model
            lacks, has in another shape, or has on the meta device; the model is then unchanged.
        OSError: If it cannot be read; the model is unchanged unless that happens after the file was verified.
    """
    for parameter, value in _with_parameters(model, path):
        local_part(parameter).take(value)


@contextmanager
def swapped_weights(model: nn.Module, source: str | Path | Mapping[str, Tensor]) -> Iterator[None]:
    """Swap other tensors into a model's parameters within a context, for this thread alone.

    The model's lock is held meanwhile. Its own parameters are not written to, so plain forward passes of other threads
    are not affected, and their memory is needed twice; what is changed about the swapped ones is lost, except for moves
    and casts. Sharded parameters (FSDP2; each rank copies its shard), and those of recurrent layers and of TorchScript,
    are instead written to in place, their values stored on the CPU and restored bit for bit, also after an exception.
    Tensors are read and copied one at a time. A file is verified before the first parameter changes.

    Args:
        model: Model whose parameters the source names.
        source: Path of a snapshot, or unsharded tensors by qualified name on any device.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the file is not a snapshot or is damaged, a tensor has non-finite values, or the source names
            parameters that the model lacks, has in another shape, or has on the meta device; the model is then
            unchanged.
        OSError: If the file cannot be read; the model is then unchanged.
    """
    originals: list[tuple[nn.Parameter, Tensor]] = []
    replacements: dict[nn.Parameter, nn.Parameter] = {}
    with model_lock(model):
        try:
            for parameter, value in _with_parameters(model, source):
                if is_replaceable(model, parameter):
                    replacements[parameter] = replacement(parameter)
                    local_part(replacements[parameter]).take(value)
                    continue
                part = local_part(parameter)
                originals.append((parameter, part.values.to("cpu", copy=True)))
                part.take(value)
            with replaced_parameters(model, replacements):
                yield
        finally:
            reshard(model)
            for parameter, original in originals:
                local_part(parameter).take(original)  # looked up again: the model may be on another device now


def opened_snapshot(path: str | Path) -> AbstractContextManager[OpenedTensorFile]:
    """Open a snapshot, to read its tensors one by one.

    Raises:
        FileNotFoundError: If the file does not exist.
        OSError: If it cannot be read, such as a `PermissionError`.
        ValueError: If it is not a snapshot, is truncated, or has another format version.
    """
    return opened_tensor_file(path, format=FORMAT, version=VERSION, remedy="train again")


def _with_parameters(
    model: nn.Module, source: str | Path | Mapping[str, Tensor]
) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """Parameters with their new values; all values are checked before the first one is yielded."""
    if isinstance(source, Mapping):
        tensors = dict(source)
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        yield from _checked(model, "the source", shapes, tensors.__getitem__)
        return
    with opened_snapshot(source) as file:
        yield from _checked(model, str(source), file.shapes, file.read)


def _checked(
    model: nn.Module, source: str, shapes: Mapping[str, tuple[int, ...]], read: Callable[[str], Tensor]
) -> Iterator[tuple[nn.Parameter, Tensor]]:
    reshard(model)
    parameters = dict(model.named_parameters())
    unknown = [name for name in shapes if name not in parameters]
    if unknown:
        raise ValueError(
            f"{source} contains {len(unknown)} tensors that this model does not have, the first is {unknown[0]!r}. "
            "Load it into the module whose parameters were saved."
        )
    for name, shape in shapes.items():
        expected = tuple(parameters[name].shape)
        if shape != expected:
            raise ValueError(
                f"{source} contains {name!r} with shape {shape}, the model has {expected}. Load it into a model of the "
                "same size."
            )
    offloaded = [name for name in shapes if parameters[name].device.type == "meta"]
    if offloaded:
        raise ValueError(
            f"{source} contains {offloaded[0]!r}, which this model holds on the meta device, without values "
            "(accelerate offloads it). Load the model without offloading these weights."
        )
    for name in shapes:
        # The first read from a file also verifies its digest.
        value = read(name)
        if not value.is_floating_point():
            raise ValueError(f"{source} contains {name!r} with the dtype {value.dtype}. Save the weights again.")
        if not bool(value.isfinite().all()):
            raise ValueError(
                f"{source} contains non-finite values in {name!r}. Use weights from before training diverged."
            )
    for name in shapes:
        yield parameters[name], read(name)
