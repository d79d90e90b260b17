"""A sample of a model's effective weights, by which they are recognised after merging, renaming or casting.

`weight_fingerprint` is an exact digest of parameters by name. A record holds values instead: those of every weight with
its adapters merged, 64 for each parameter, each expert's part of a fused one, or each row of a larger matrix one. So it
can be compared with a model whose adapters were merged since, that lies under another attribute, or that was cast.

A head or an adapter outside of the transformers model shapes the logits too. Those parameters and buffers of it that
`class_logits` uses (see `UsedWeights`) have a record of their own, and are compared if the model at hand has them: a
posterior may be served with the transformers model alone.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from bmoe_lightning.experts.fingerprint import fingerprinted_module, joined_samples, sample
from bmoe_lightning.experts.fsdp import has_shards, reshard
from bmoe_lightning.experts.sampled_values import equal_values
from bmoe_lightning.experts.types import ExpertLayer
from bmoe_lightning.experts.wrappers.accelerate import materialized, offloaded_weights
from bmoe_lightning.experts.wrappers.names import inner_name, plain_name, unwrapped
from bmoe_lightning.experts.wrappers.peft import MODULES_TO_SAVE, is_adapter, merged_copy
from bmoe_lightning.experts.wrappers.quantised import unusable
from bmoe_lightning.experts.wrappers.transformers import outermost_pretrained

_VALUES, _DESCRIPTION, _OUTSIDE = "values", "description", "outside."


@dataclass(frozen=True, eq=False)
class WeightRecord:
    """Sampled effective weights, by plain names relative to `fingerprinted_module`.

    Attributes:
        layers: Plain names of the expert layers.
        samples: Values of each parameter, float32 on the CPU; empty for a quantised one.
        dtypes: Dtype of each parameter.
        outside: Record of the parameters outside of `fingerprinted_module`, by plain names relative to the model; its
            `layers` is the plain name of that module. None in files of an earlier version.
    """

    layers: tuple[str, ...]
    samples: Mapping[str, Tensor]
    dtypes: Mapping[str, torch.dtype]
    outside: WeightRecord | None = None

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, WeightRecord):
            return NotImplemented
        if (self.layers, dict(self.dtypes), self.outside) != (other.layers, dict(other.dtypes), other.outside):
            return False
        return all(equal_values(values, other.samples[name]) for name, values in self.samples.items())

    __hash__ = object.__hash__

    def part(self, names: Collection[str]) -> WeightRecord:
        """The record of some of the parameters."""
        samples = {name: values for name, values in self.samples.items() if name in names}
        return replace(self, samples=samples, dtypes={name: self.dtypes[name] for name in samples})

    def tensors(self) -> dict[str, Tensor]:
        """The record as tensors, for a safetensors file; see `from_tensors`."""
        described = {
            "layers": list(self.layers),
            "parameters": [
                [name, len(values), str(self.dtypes[name]).removeprefix("torch.")]
                for name, values in self.samples.items()
            ],
        }
        text = torch.frombuffer(bytearray(json.dumps(described).encode()), dtype=torch.uint8)
        outside = {} if self.outside is None else self.outside.tensors()
        return {
            _VALUES: torch.cat([torch.empty(0), *self.samples.values()]),
            _DESCRIPTION: text.clone(),
            **{f"{_OUTSIDE}{name}": value for name, value in outside.items()},
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> WeightRecord | None:
        """The record that `tensors` describes; None if there is none.

        Raises:
            ValueError: If they describe no record.
        """
        if _VALUES not in tensors or _DESCRIPTION not in tensors:
            return None
        outside = {name.removeprefix(_OUTSIDE): value for name, value in tensors.items() if name.startswith(_OUTSIDE)}
        try:
            described = json.loads(bytes(tensors[_DESCRIPTION].tolist()))
            parameters = [
                (str(name), int(length), getattr(torch, dtype)) for name, length, dtype in described["parameters"]
            ]
            parts = tensors[_VALUES].split([length for _, length, _ in parameters])
            return cls(
                tuple(map(str, described["layers"])),
                {name: part for (name, _, _), part in zip(parameters, parts, strict=True)},
                {name: dtype for name, _, dtype in parameters},
                cls.from_tensors(outside),
            )
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"its record of the weights is damaged ({error!r})") from error


def weight_record(model: nn.Module, layers: Sequence[ExpertLayer]) -> WeightRecord | None:
    """Record a model's effective weights. A collective, if they are sharded.

    Args:
        model: The model.
        layers: Its expert layers.

    Returns:
        The record; None if the model is sharded and has adapters, since no rank has the merged weights.
    """
    reshard(model)
    root = fingerprinted_module(model, layers)
    sharded = has_shards(model)
    if sharded and any(is_adapter(module) for module in root.modules()):
        return None
    prefix = _name_of(root, model)
    names = tuple(plain_name(layer.name.removeprefix(f"{prefix}.") if prefix else layer.name) for layer in layers)
    return WeightRecord(names, *_sampled(_effective_parameters(root, ""), sharded=sharded))


def outside_record(model: nn.Module, layers: Sequence[ExpertLayer]) -> WeightRecord:
    """Record a model's effective weights outside of `fingerprinted_module`, and buffers. A collective, if sharded.

    Those that lie on the meta device or are not initialised, which no forward pass can use, are recorded by name alone.
    The buffers are those of `recorded_buffers`.

    Args:
        model: The model.
        layers: Its expert layers.
    """
    reshard(model)
    root = fingerprinted_module(model, layers)
    sharded = has_shards(model)
    inside = {id(parameter) for parameter in root.parameters()}
    tied = {plain_name(n) for n, p in model.named_parameters(remove_duplicate=False) if id(p) in inside}
    found = _effective_parameters(model, "", skipped=root, merged=not sharded)
    parameters = ((name, weight, dtype) for name, weight, dtype in found if name not in tied)
    buffers = ((name, module._buffers[key]) for name, module, key in recorded_buffers(model, layers))
    values = ((name, torch.view_as_real(b) if b.is_complex() else b, b.dtype) for name, b in buffers if b is not None)
    return WeightRecord(
        (plain_name(_name_of(root, model)),),
        *_sampled(chain(parameters, values), sharded=sharded, replicas_agree=False),
    )


def recorded_buffers(model: nn.Module, layers: Sequence[ExpertLayer]) -> Iterator[tuple[str, nn.Module, str]]:
    """Plain name, module and key of the buffers that are recorded, such as the running statistics of a normalisation.

    These are the ones of a checkpoint that have values, outside of the transformers model: its own buffers follow from
    its configuration or are packed weights, with few exceptions.

    Args:
        model: The model.
        layers: Its expert layers.
    """
    root = fingerprinted_module(model, layers)
    pretrained = any(root is candidate for candidate in outermost_pretrained(model))
    inside = set(root.modules()) if pretrained else set()
    for prefix, module in model.named_modules():
        for key, buffer in module.named_buffers(recurse=False):
            is_stored = module not in inside and key not in module._non_persistent_buffers_set
            if is_stored and buffer.numel() and buffer.device.type != "meta":
                yield plain_name(f"{prefix}.{key}" if prefix else key), module, key


def _name_of(part: nn.Module, model: nn.Module) -> str:
    return next((name for name, module in model.named_modules() if module is part), "")


def _sampled(
    parameters: Iterable[tuple[str, Tensor | None, torch.dtype]], *, sharded: bool, replicas_agree: bool = True
) -> tuple[dict[str, Tensor], dict[str, torch.dtype]]:
    """Samples and dtypes by name; see `joined_samples`."""
    samples: dict[str, Tensor] = {}
    dtypes: dict[str, torch.dtype] = {}
    for name, weight, dtype in parameters:
        none = torch.empty(0, 3) if sharded else torch.empty(0)
        samples.setdefault(name, none if weight is None else sample(weight, sharded=sharded))
        dtypes.setdefault(name, dtype)
    if not samples:
        return {}, {}
    values = joined_samples(list(samples.values()), sharded=sharded, replicas_agree=replicas_agree)
    parts = values.split([len(part) for part in samples.values()])
    return dict(zip(samples, parts, strict=True)), dtypes


def _effective_parameters(
    module: nn.Module, prefix: str, *, skipped: nn.Module | None = None, merged: bool = True
) -> Iterator[tuple[str, Tensor | None, torch.dtype]]:
    """Plain name, value and dtype of every parameter; the value of one that cannot be read is None.

    Args:
        module: The module.
        prefix: What the names begin with.
        skipped: A module whose parameters are left out.
        merged: Whether adapters are merged.
    """
    if module is skipped:
        return
    children = dict(module.named_children())
    inner = inner_name(module)
    if merged and is_adapter(module) and not any(unusable(parameter) for parameter in module.parameters()):
        adapted = {name: parameter.dtype for name, parameter in unwrapped(module).named_parameters()}
        for name, weight, dtype in _effective_parameters(merged_copy(module), ""):
            yield f"{prefix}{name}", weight, adapted.get(name, dtype)
    elif merged and inner is not None and (len(children) == 1 or MODULES_TO_SAVE in children):
        yield from _effective_parameters(module.get_submodule(inner), prefix, skipped=skipped)
    else:
        for name, parameter in module.named_parameters(recurse=False):
            readable = not unusable(parameter) and (skipped is None or _has_values(module, parameter))
            weight = materialized(module, name).detach() if readable else None
            yield plain_name(f"{prefix}{name}"), weight, parameter.dtype
        for name, child in children.items():
            yield from _effective_parameters(child, f"{prefix}{name}.", skipped=skipped, merged=merged)


def _has_values(module: nn.Module, parameter: Tensor) -> bool:
    return not is_lazy(parameter) and (parameter.device.type != "meta" or offloaded_weights(module) is not None)
