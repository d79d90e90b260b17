"""Random mutations of a file of this package: of its bytes, its header, its tensors, or for that of another fit.

Each is one of: a flipped bit, a truncation, added bytes; an edit of a header under its old digest; a value that no fit
has (NaN, negative, another dtype or shape, a missing or renamed key, another JSON type) under digests that were all
computed again; the counterpart of another fit.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from bmoe_lightning.methods.fit_index import INDEX_FILE
from bmoe_lightning.utils.file_contract import header_of, with_header
from bmoe_lightning.utils.file_header import seal
from bmoe_lightning.utils.safetensors_io import METADATA_KEY, tensor_digest

DAMAGES = ("bytes", "bytes", "unsealed")
"""Kinds of mutations under the old digests, as often as they are drawn."""
ALL = (*DAMAGES, "sealed json", "tensor", "tensor", "swap")
"""Those, and others that are no damage: a value that no fit has, or another fit's file."""

# Weights, moments and held-out logits of either sign are valid.
_ANY_SIGN = ("mean/", "deviations/", ".calibration/", "mlp.", "lora_", "basis", "gram", "sketch", "omega", "factor")
_NET, _NET_NOT_NEGATIVE = "net.", ("variance", "prior_scale", "rate")  # weights of a Bayesian router, but for these
# Another value of these is another valid file, as that of another run: under digests of its own nothing can tell.
_FREE = ("generator", "seed", "label", "warnings", "labels", "superseded", "num_examples", "digest", "examples",
         "batches", "checked", "writes")  # fmt: skip
_JSON_VALUES: tuple[Any, ...] = (None, "x", -1, 1.5, [], {}, [1], {"a": 1}, float("nan"), True)
_DTYPES = (torch.int32, torch.bool, torch.complex64, torch.float64, torch.uint8)


@dataclass(frozen=True)
class Mutation:
    """New content of a file.

    Attributes:
        name: What was changed.
        content: The new bytes.
        sealed: Whether its digests match, so that an index which names the file is given the new one.
    """

    name: str
    content: bytes
    sealed: bool = False

    def apply(self, path: Path, folder: Path) -> None:
        """Write the file, and its digest into the index of the fit that it belongs to.

        Args:
            path: The file.
            folder: Folder in which the index is, if there is one.
        """
        for index in folder.rglob(INDEX_FILE) if self.sealed and path.suffix != ".json" else ():
            fields = json.dumps(json.loads(index.read_text()))
            old, new = (header_of(content)["sha256"] for content in (path.read_bytes(), self.content))
            index.write_text(seal(json.loads(fields.replace(old, new)))[0])
        path.write_bytes(self.content)


def mutation(
    path: Path, rng: random.Random, kinds: tuple[str, ...], mates: Callable[[Path], list[Path]]
) -> Mutation | None:
    """Draw a mutation of a file; None if the kind that was drawn does not apply to it.

    Args:
        path: The file.
        rng: Source of all choices.
        kinds: Kinds to draw from; see `ALL`.
        mates: Files of other fits, or of other epochs, that may be put in the place of one.
    """
    content, kind = path.read_bytes(), rng.choice(kinds)
    if kind == "bytes":
        found: Mutation | None = _bytes_mutated(content, rng)
    elif kind == "swap":
        found = _swapped(content, rng, mates(path))
    elif not _has_header(content):
        found = None
    elif kind == "unsealed":
        found = _header_mutated(content, rng)
    elif kind == "sealed json":
        found = _description_mutated(content, rng)
    else:
        found = _tensor_mutated(content, rng) if path.suffix == ".safetensors" else None
    return None if found is None or found.content == content else found


def edited_json(value: Any, rng: random.Random, free: tuple[str, ...]) -> tuple[str, Any]:
    """A copy in which one entry is removed, renamed or replaced by a value of another kind, and the entry's place.

    Args:
        value: Nested dictionaries and lists.
        rng: Source of all choices.
        free: Parts of names of entries that stay.
    """
    value = copy.deepcopy(value)
    places = [place for place in _places(value) if not any(name in str(key) for name in free for key in place[2])]
    parent, key, names = rng.choice(places)
    old, kind = parent[key], rng.choice(("remove", "rename", "replace", "replace"))
    if kind == "remove" or (kind == "rename" and isinstance(parent, list)):
        del parent[key]
    elif kind == "rename":
        parent[f"{key}x"] = parent.pop(key)
    else:
        parent[key] = rng.choice([other for other in _JSON_VALUES if type(other) is not type(old) and other != old])
    return f"{kind} {'.'.join(map(str, names))}", value


def _places(value: Any, names: tuple[Any, ...] = ()) -> Iterator[tuple[Any, Any, tuple[Any, ...]]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in list(items):
        yield value, key, (*names, key)
        yield from _places(entry, (*names, key))


def _has_header(content: bytes) -> bool:
    """Whether a file has a header of this package."""
    try:
        return header_of(content).keys() >= {"format", "sha256"}
    except (ValueError, LookupError, TypeError):
        return False


def _bytes_mutated(content: bytes, rng: random.Random) -> Mutation:
    kind = rng.choice(("flip", "flip", "flip", "truncate", "append", "header"))
    if kind == "truncate":
        return Mutation("truncated", content[: rng.randrange(len(content))])
    if kind == "append":
        return Mutation("bytes added", content + bytes(rng.randrange(1, 20)))
    is_tensors = content[:1] != b"{" and len(content) > 8
    header = 8 + int.from_bytes(content[:8], "little") if is_tensors else len(content)
    position = rng.randrange(min(header, len(content)) if kind == "header" else len(content))
    mutated = bytearray(content)
    mutated[position] ^= 1 << rng.randrange(8)
    return Mutation(f"bit of byte {position}", bytes(mutated))


def _header_mutated(content: bytes, rng: random.Random) -> Mutation:
    """An edit of the JSON header under its old digest."""
    header = header_of(content)
    place, edited = edited_json({key: value for key, value in header.items() if key != "sha256"}, rng, free=())
    fields = {**edited, "sha256": header["sha256"]}
    return Mutation(f"unsealed header: {place}", with_header(content, fields, sealed=False))


def _description_mutated(content: bytes, rng: random.Random) -> Mutation:
    header = header_of(content)
    place, edited = edited_json({"description": header["description"], "fit": header["fit"]}, rng, _FREE)
    return Mutation(f"sealed header: {place}", with_header(content, {**header, **edited}), sealed=True)


def _swapped(content: bytes, rng: random.Random, mates: list[Path]) -> Mutation | None:
    others = [mate for mate in mates if mate.read_bytes() != content]
    if not others:
        return None
    mate = rng.choice(others)
    return Mutation(f"swapped for {mate.name}", mate.read_bytes())


def _tensor_mutated(content: bytes, rng: random.Random) -> Mutation | None:
    """A tensor that no fit has, under digests that were computed again."""
    tensors = load(content)
    name = rng.choice(sorted(tensors))
    kind = rng.choice(("nan", "inf", "negative", "dtype", "shape", "remove", "rename"))
    if kind in ("remove", "rename"):
        if name.startswith(".calibration"):
            return None  # a fit without held-out data or labels is valid
        value = tensors.pop(name)
        tensors |= {f"{name}x": value} if kind == "rename" else {}
    else:
        changed = _VALUES[kind](name, tensors[name], rng)
        if changed is None:
            return None
        tensors[name] = changed
    header = header_of(content)
    header["tensors"] = {name: tensor_digest(name, value) for name, value in tensors.items()}
    tensors = {name: value.contiguous() for name, value in tensors.items()}
    return Mutation(f"{kind} {name}", save(tensors, {METADATA_KEY: seal(header)[0]}), sealed=True)


def _nan(name: str, value: Tensor, rng: random.Random) -> Tensor | None:  # noqa: ARG001
    return _with_entry(value, float("nan"), rng)


def _infinite(name: str, value: Tensor, rng: random.Random) -> Tensor | None:  # noqa: ARG001
    return _with_entry(value, float("inf"), rng)


def _with_entry(value: Tensor, number: float, rng: random.Random) -> Tensor | None:
    if not value.is_floating_point() or not value.numel():
        return None
    value = value.clone()
    value.view(-1)[rng.randrange(value.numel())] = number
    return value


def _negative(name: str, value: Tensor, rng: random.Random) -> Tensor | None:  # noqa: ARG001
    in_net = f"/{_NET}" in f"/{name}" and name.rpartition(".")[2] not in _NET_NOT_NEGATIVE
    if in_net or any(part in name for part in _ANY_SIGN):
        return None
    return -value - 1 if value.is_floating_point() and float(value.abs().sum()) > 0 else None


def _other_dtype(name: str, value: Tensor, rng: random.Random) -> Tensor | None:
    to = rng.choice(_DTYPES)
    return None if to == value.dtype or any(part in name for part in _FREE) else value.to(to)


def _other_shape(name: str, value: Tensor, rng: random.Random) -> Tensor | None:
    if value.numel() < 2:
        return None
    shorter, flat = value[:-1], value.flatten()
    if name.startswith(".calibration"):
        return shorter
    changed = (shorter, value.unsqueeze(0), flat, flat[:-1])
    return rng.choice([other for other in changed if other.shape != value.shape])


_VALUES: dict[str, Callable[[str, Tensor, random.Random], Tensor | None]] = {
    "nan": _nan,
    "inf": _infinite,
    "negative": _negative,
    "dtype": _other_dtype,
    "shape": _other_shape,
}
