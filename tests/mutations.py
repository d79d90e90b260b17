"""Mutates every file that a fit writes, and reads it again: refused in a sentence that names the file, or no change.

    python -m mutations 2000        # from tests/, prints the counts

Each mutation is one of: a flipped bit, a truncation, added bytes; an edit of a header under its old digest; a value
that no fit has (NaN, negative, another dtype or shape, a missing or renamed key, another JSON type) under digests that
were all computed again; the counterpart of another fit.
"""

from __future__ import annotations

import copy
import json
import random
import shutil
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from oracles.models import answer_logits, split, toy_batch, toy_model
from safetensors import safe_open
from safetensors.torch import save

from bmoe_lightning.curvature import Curvature, collect_factors
from bmoe_lightning.laplace import LaplacePosterior, WeightMismatchError
from bmoe_lightning.methods import NotFittedError, evaluate, fit_index, fit_methods, get_method, save_snapshot, storage
from bmoe_lightning.methods.registry import built_in_names
from bmoe_lightning.utils.file_contract import _header, _same, with_header
from bmoe_lightning.utils.file_header import seal
from bmoe_lightning.utils.safetensors_io import METADATA_KEY, tensor_digest

REFUSALS = (ValueError, FileNotFoundError, OSError, NotFittedError, WeightMismatchError)
BATCHES = split(toy_batch(num_rows=24, seed=3), 12, 12)
CALIBRATION = [toy_batch(num_rows=104, seed=4)]
TRAINED = ("layers.0.mixture.crew.down_proj", "layers.1.mixture.crew.down_proj")
# Weights, moments and held-out logits of either sign are valid.
ANY_SIGN = ("mean/", "deviations/", ".calibration/", "mixture.", "basis", "gram", "sketch", "omega", "factor")
NET, NET_NOT_NEGATIVE = "net.", ("variance", "prior_scale", "rate")  # weights of a Bayesian router, but for these
# Another value of these is another valid file, as that of another run: under digests of its own nothing can tell.
FREE = ("generator", "seed", "label", "warnings", "labels", "superseded", "num_examples", "digest", "examples",
        "batches", "checked", "writes")  # fmt: skip


@dataclass(frozen=True)
class Sample:
    """A folder with a fit and one with a killed pass, and how they are read."""

    folder: Path
    methods: tuple[Any, ...]

    def read_fit(self, folder: Path) -> Any:
        fit, snapshots = storage.load_fit(folder)
        model = toy_model()
        fit.check_weights(model)
        found = evaluate(self.methods, fit, model, answer_logits, BATCHES, snapshots)
        served = LaplacePosterior.load(folder / fit_index.POSTERIOR_FILE)
        return {
            "predictions": {name: p.log_probs for name, p in found.items()},
            "scalars": {key: torch.tensor(value) for key, value in fit.scalars(self.methods).items()},
            "seed": fit.seed,
            "served": served.predict(model, answer_logits, BATCHES[0], num_samples=50),
            "calibration": fit.calibration,
        }

    def read_pass(self, folder: Path) -> Any:
        path = next(folder.glob("curvature*"))
        factors = collect_factors(toy_model(), answer_logits, BATCHES, rank=2, checkpoint=path, checkpoint_every=1)
        return {name: value for layer in factors.layers for name, value in layer.tensors().items()}


def make(folder: Path) -> Sample:
    """Write two fits and a killed pass."""
    curvatures = {"laplace_evidence": Curvature(rank=2, fisher="empirical")}
    methods = []
    for name in built_in_names():
        method = get_method(name)
        if hasattr(method, "runs") or hasattr(method, "head") or method.needs.lora:  # other runs; other kinds of models
            continue
        if name == "temperature_router":  # not with a gate that is a linear layer
            continue
        small = {field: 20 for field in ("num_samples",) if hasattr(method, field) and method.name != "swag"}
        methods.append(replace(method, **small).with_defaults(curvatures.get(name, Curvature(rank=2))))
    for number, part in enumerate(("one", "other")):
        torch.manual_seed(number)
        fit_id = str(number) * 32
        snapshots = []
        for epoch in range(3):
            path = folder / part / "snapshots" / f"{fit_id[:8]}-epoch-{epoch:04d}.safetensors"
            weights = {name: toy_model(seed=number * 10 + epoch).get_parameter(name) for name in TRAINED}
            save_snapshot(path, weights, fit=fit_id)
            snapshots.append(path)
        prior_mean = {name: 0.9 * toy_model().get_parameter(name).detach() for name in TRAINED}
        with mock.patch.object(storage, "_LARGE", 1000):
            fit = fit_methods(
                methods, toy_model(), answer_logits, BATCHES, CALIBRATION, prior_mean=prior_mean, snapshots=snapshots,
                seed=number, fit_id=fit_id,
            )  # fmt: skip
            storage.save_fit(folder / part, fit, snapshots)
    (folder / "pass").mkdir()

    class Killed(Exception):
        pass

    def batches() -> Iterator[Any]:
        yield BATCHES[0]
        raise Killed

    try:
        path = folder / "pass" / "curvature.safetensors"
        collect_factors(toy_model(), answer_logits, batches(), rank=2, checkpoint=path, checkpoint_every=1)
    except Killed:
        pass
    return Sample(folder, tuple(methods))


def bytes_mutated(content: bytes, rng: random.Random) -> tuple[str, bytes]:
    """Damage of the bytes themselves."""
    kind = rng.choice(("flip", "flip", "flip", "truncate", "append", "header"))
    if kind == "truncate":
        return kind, content[: rng.randrange(len(content))]
    if kind == "append":
        return kind, content + bytes(rng.randrange(1, 20))
    start = 8 + int.from_bytes(content[:8], "little") if content[:1] != b"{" else len(content)
    position = rng.randrange(min(start, len(content)) if kind == "header" else len(content))
    mutated = bytearray(content)
    mutated[position] ^= 1 << rng.randrange(8)
    return kind, bytes(mutated)


def header_mutated(content: bytes, rng: random.Random) -> tuple[str, bytes]:
    """An edit of the JSON header under its old digest."""
    header = _header(content)
    path, edited = edited_json({key: value for key, value in header.items() if key != "sha256"}, rng, free=())
    return f"unsealed {path}", with_header(content, {**edited, "sha256": header["sha256"]}, sealed=False)


def edited_json(value: Any, rng: random.Random, free: tuple[str, ...]) -> tuple[str, Any]:
    """A copy in which one entry is removed, renamed or replaced by a value of another kind, and the entry's place."""
    value = copy.deepcopy(value)
    places = [place for place in _places(value) if not any(name in str(key) for name in free for key in place[2])]
    parent, key, names = rng.choice(places)
    old, kind = parent[key], rng.choice(("remove", "rename", "replace", "replace"))
    if kind == "remove" or (kind == "rename" and isinstance(parent, list)):
        del parent[key]
    elif kind == "rename":
        parent[f"{key}x"] = parent.pop(key)
    else:
        options = [None, "x", -1, 1.5, [], {}, [1], {"a": 1}, float("nan"), True]
        parent[key] = rng.choice([option for option in options if type(option) is not type(old) and option != old])
    return f"{kind} {'.'.join(map(str, names))}", value


def _places(value: Any, names: tuple[Any, ...] = ()) -> Iterator[tuple[Any, Any, tuple[Any, ...]]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in list(items):
        yield value, key, (*names, key)
        yield from _places(entry, (*names, key))


def tensor_mutated(  # noqa: C901  (one branch a kind)
    content: bytes, rng: random.Random, folder: Path
) -> tuple[str, bytes] | None:
    """A tensor that no fit has, under digests that were computed again."""
    scratch = folder / "scratch.safetensors"
    scratch.write_bytes(content)
    with safe_open(scratch, framework="pt") as file:
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    scratch.unlink()
    name = rng.choice(sorted(tensors))
    value = tensors[name]
    kind = rng.choice(("nan", "inf", "negative", "dtype", "shape", "remove", "rename"))
    free = any(part in name for part in FREE)
    if kind in ("nan", "inf") and value.is_floating_point() and value.numel():
        value.view(-1)[rng.randrange(value.numel())] = float(kind)
    elif kind == "negative" and value.is_floating_point() and float(value.abs().sum()) > 0:
        if any(part in name for part in ANY_SIGN) or (
            f"/{NET}" in f"/{name}" and name.rpartition(".")[2] not in NET_NOT_NEGATIVE
        ):
            return None
        tensors[name] = -value - 1
    elif kind == "dtype":
        to = rng.choice((torch.int32, torch.bool, torch.complex64, torch.float64, torch.uint8))
        if to == value.dtype or free:
            return None
        tensors[name] = value.to(to)
    elif kind == "shape" and value.numel() > 1:
        changed = (value[:-1], value.unsqueeze(0), value.flatten(), value.flatten()[:-1])
        tensors[name] = rng.choice([option for option in changed if option.shape != value.shape])
        if name.startswith(".calibration"):
            tensors[name] = value[:-1]
    elif kind == "remove" and not name.startswith(".calibration/labels"):
        del tensors[name]
    elif kind == "rename":
        tensors[f"{name}x"] = tensors.pop(name)
    else:
        return None
    if name.startswith(".calibration") and kind in ("remove", "rename"):
        return None  # a fit without held-out data or labels is valid
    header = _header(content)
    header["tensors"] = {name: tensor_digest(name, value) for name, value in tensors.items()}
    tensors = {name: value.contiguous() for name, value in tensors.items()}
    return f"{kind} {name}", save(tensors, {METADATA_KEY: seal(header)[0]})


def reseal_index(folder: Path, path: Path, content: bytes) -> None:
    """Put a file's new digest into the index."""
    index = folder / fit_index.INDEX_FILE
    fields = json.loads(index.read_text())
    text = json.dumps(fields).replace(_header(path.read_bytes())["sha256"], _header(content)["sha256"])
    index.write_text(seal(json.loads(text))[0])


def mutations(  # noqa: C901  (one branch a kind)
    path: Path, folder: Path, other: Path, rng: random.Random
) -> tuple[str, Callable[[], None]] | None:
    """One random mutation of a file in a folder, and what applies it."""
    content = path.read_bytes()
    kind = rng.choice(("bytes", "bytes", "unsealed", "sealed json", "tensor", "tensor", "swap"))
    if kind == "swap":
        mates = [
            mate for mate in other.rglob(f"*{path.suffix}") if mate.name[:6] == path.name[:6] or "epoch" in mate.name
        ]
        if "epoch" in path.name:
            mates = [mate for mate in folder.rglob("*epoch*") if mate != path] + list(other.rglob("*epoch*"))
        mates = [mate for mate in mates if mate.read_bytes() != content and mate.suffix == path.suffix]
        if not mates:
            return None
        mate = rng.choice(mates).read_bytes()
        return f"swap {path.name}", lambda: path.write_bytes(mate) and None
    if kind == "bytes":
        name, mutated = bytes_mutated(content, rng)
    elif kind == "unsealed":
        name, mutated = header_mutated(content, rng)
    elif kind == "sealed json":
        header = _header(content)
        place, edited = edited_json({"description": header["description"], "fit": header["fit"]}, rng, FREE)
        name, mutated = f"sealed {place}", with_header(content, {**header, **edited})
    else:
        found = tensor_mutated(content, rng, folder) if path.suffix == ".safetensors" else None
        if found is None:
            return None
        name, mutated = found
    if mutated == content:
        return None

    def apply() -> None:
        if kind in ("sealed json", "tensor") and (folder / fit_index.INDEX_FILE).exists() and path.suffix != ".json":
            reseal_index(folder, path, mutated)
        path.write_bytes(mutated)

    return f"{kind}: {name}", apply


def tracebacks(sample: Sample) -> Iterator[str]:
    """A line for each value of a method whose absence, or another name, is not refused in a sentence."""
    fit, _ = storage.load_fit(sample.folder / "one")
    for method in sample.methods:
        state = fit.state_of(method)
        for name in state:
            rest = {key: value for key, value in state.items() if key != name}
            for kind, changed in (("remove", rest), ("rename", {**rest, f"{name}x": state[name]})):
                try:
                    method.check_state(changed)
                except ValueError:
                    pass
                except Exception as error:  # noqa: BLE001  (that is what is counted)
                    yield f"TRACEBACK {kind} {method.name}/{name}: {error!r}"


def run(count: int, folder: Path, seed: int = 0) -> tuple[Counter[str], list[str]]:
    """Apply many mutations.

    Returns:
        How many were refused and how many had no effect, and a line for each fault.
    """
    sample = make(folder)
    rng = random.Random(seed)
    outcomes: Counter[str] = Counter()
    faults = list(tracebacks(sample))
    before = {"one": sample.read_fit(folder / "one"), "pass": None}
    shutil.copytree(folder / "pass", folder / "whole")
    before["pass"] = sample.read_pass(folder / "whole")
    while sum(outcomes.values()) + len(faults) < count:
        part = rng.choice(("one", "one", "one", "pass"))
        work = folder / "work"
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(folder / part, work)
        path = rng.choice(sorted(file for file in work.rglob("*") if file.is_file()))
        mutation = mutations(path, work, folder / "other", rng)
        if mutation is None:
            continue
        name, apply = mutation
        apply()
        line = f"{part}/{path.relative_to(work)}: {name}"
        try:
            with torch.random.fork_rng():
                torch.manual_seed(0)
                found = (sample.read_pass if part == "pass" else sample.read_fit)(work)
        except REFUSALS as error:
            if str(work) in str(error) or isinstance(error, (NotFittedError, WeightMismatchError)):
                outcomes["refused"] += 1
            else:
                faults.append(f"NO FILE NAMED {line}: {error!r}")
        except Exception as error:  # noqa: BLE001  (that is what is counted)
            faults.append(f"TRACEBACK {line}: {error!r}")
        else:
            if _same(found, before[part]):
                outcomes["no effect"] += 1
            else:
                faults.append(f"ACCEPTED {line}")
    return outcomes, faults


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        outcomes, faults = run(int(sys.argv[1]), Path(scratch), int(sys.argv[2]) if len(sys.argv) > 2 else 0)
    print(*faults, sep="\n")
    print(f"{sum(outcomes.values()) + len(faults)} mutated: {dict(outcomes)}, {len(faults)} faults")
