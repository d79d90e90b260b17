"""Which parameters and buffers outside of the fingerprinted module `class_logits` computes with.

A LightningModule may hold a head, and also a teacher, a metric or an average of the weights, which cannot affect the
logits and may differ from one process to the next. So calls of `class_logits` are observed: a parameter or buffer is
used if an operation that reads values gets it. A buffer that `class_logits` writes to, such as a counter, is left out:
it differs from one call to the next.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from bmoe_lightning.experts.fingerprint import fingerprinted_module
from bmoe_lightning.experts.logits_contract import ClassLogits
from bmoe_lightning.experts.types import ExpertLayer
from bmoe_lightning.experts.weight_comparison import compare_outside
from bmoe_lightning.experts.weight_record import WeightRecord, outside_record, recorded_buffers
from bmoe_lightning.experts.wrappers.compiled import eager_code
from bmoe_lightning.experts.wrappers.names import plain_name
from bmoe_lightning.experts.write_counts import write_count
from bmoe_lightning.utils.distributed import sum_over_processes

# Methods of a tensor that read or write no values.
_METADATA = frozenset((
    "__hash__", "__len__", "__set__", "dim", "element_size", "get_device", "has_names", "is_complex", "is_contiguous",
    "is_floating_point", "is_inference", "is_set_to", "ndimension", "nelement", "numel", "register_hook",
    "register_post_accumulate_grad_hook", "requires_grad_", "retain_grad", "size", "storage_offset", "stride",
))  # fmt: skip
_GRADIENTS = ("grad", "_grad")


class UsedWeights:
    """The weights of a model outside of `fingerprinted_module`, and which of them `class_logits` uses.

    Creating it is a collective, if the weights are sharded.

    Args:
        model: The model.
        layers: Its expert layers.
    """

    def __init__(self, model: nn.Module, layers: Sequence[ExpertLayer]) -> None:
        self._record = outside_record(model, layers)
        inside = set(fingerprinted_module(model, layers).modules())
        self._places = [
            (name, module, key)
            for prefix, module in model.named_modules()
            if module not in inside
            for key, _ in module.named_parameters(recurse=False, remove_duplicate=False)
            if (name := plain_name(f"{prefix}.{key}")) in self._record.samples
        ]
        buffers = [place for place in recorded_buffers(model, layers) if place[0] in self._record.samples]
        self._buffers = [(*place, *_content(*place[1:])) for place in buffers]
        self._places += buffers
        # Operations of TorchScript are not seen.
        self._used = {name for name, module, _ in self._places if isinstance(module, torch.jit.ScriptModule)}
        self._named: set[str] = set()
        self._calls = 0

    def add(self, modules: Iterable[nn.Module]) -> None:
        """Count the weights of some modules as used, whatever `class_logits` does: what a fit takes from them.

        Args:
            modules: Modules of the model.
        """
        parts = {part for module in modules for part in module.modules()}
        self._named |= {name for name, module, _ in self._places if module in parts}
        self._used |= self._named

    def observed(self, class_logits: ClassLogits) -> ClassLogits:
        """The same function, some of whose calls are observed: ever fewer, since each takes a little longer."""
        if not self._places:
            return class_logits

        def observing(model: Any, batch: Any) -> tuple[Tensor, Tensor | None]:
            self._calls += 1
            is_observed = self._calls & (self._calls - 1) == 0  # 1, 2, 4, 8 ...
            # Compiled code skips the mode.
            with eager_code() if is_observed else nullcontext(), self._mode() if is_observed else nullcontext():
                return class_logits(model, batch)

        return observing

    def record(self, *, distributed: bool = False) -> WeightRecord:
        """The record of the used weights; of all, where no call has been observed. A collective, if distributed.

        Args:
            distributed: Whether all ranks of torch.distributed's default group call this; what one of them uses is
                used.
        """
        used = self._used_by_calls(distributed=distributed)
        return self._record if used is None else self._record.part(used)

    def added_to(
        self, record: WeightRecord | None, *, distributed: bool = False, all_without_calls: bool = True
    ) -> WeightRecord | None:
        """A record of the fingerprinted module with that of the used weights outside of it.

        Args:
            record: The record; None if only a fingerprint is known. If it has weights outside, those of `add` alone are
                added to them.
            distributed: See `record`.
            all_without_calls: Whether all weights are added where no call has been observed; otherwise none are.
        """
        if record is not None and record.outside is not None:
            known, named = record.outside, self._record.part(self._named)
            samples, dtypes = {**named.samples, **known.samples}, {**named.dtypes, **known.dtypes}
            return replace(record, outside=replace(known, samples=samples, dtypes=dtypes))
        used = self._used_by_calls(distributed=distributed)
        if used is None and not all_without_calls:
            return record
        outside = self._record if used is None else self._record.part(used)
        if record is None and not outside.samples:
            return None
        return replace(record or WeightRecord((), {}, {}), outside=outside)

    def _used_by_calls(self, *, distributed: bool) -> set[str] | None:
        """The names of the used weights; None where no call has been observed. A collective, if distributed."""
        names, written = list(self._record.samples), self._written()
        counts = torch.tensor([self._calls, *(int(name in self._used) for name in names)])
        writes = torch.tensor([int(name in written) for name in names])
        if distributed and names:
            sum_over_processes([counts, writes])
        found = zip(names, counts[1:].tolist(), writes.tolist(), strict=True)
        used = {name for name, count, writing in found if count and not writing}
        return used if counts[0] else None

    def state(self) -> dict[str, Tensor]:
        """The weights that were used so far, to resume a pass."""
        return self._record.part(self._used - self._written()).tensors()

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Add those of a `state`; raises `ValueError` if they are others than the model's. Nothing without a state."""
        before = WeightRecord.from_tensors(state)
        if before is None:
            return
        found = compare_outside(before, self._record)
        if not found.same:
            raise ValueError(f"other weights than the model has{found.reason()}")
        self._used |= before.samples.keys()
        self._calls = max(self._calls, 1)

    def _written(self) -> set[str]:
        """Names of the buffers that were written to, or replaced, since they were recorded."""
        return {name for name, module, key, *before in self._buffers if list(_content(module, key)) != before}

    def _mode(self) -> _Observer:
        return _Observer(self._places, self._used)


class _Observer(TorchFunctionMode):
    """Adds to a set the names of the parameters and buffers that operations of this thread read.

    Args:
        places: Name, module and key of each. FSDP2 and accelerate replace it there while the module runs.
        used: The set.
    """

    def __init__(self, places: Sequence[tuple[str, nn.Module, str]], used: set[str]) -> None:
        super().__init__()
        self._places = [place for place in places if place[0] not in used]
        self._used = used

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if self._places and _reads_values(func, result):
            given = {id(value) for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)}
            self._used |= {name for name, module, key in self._places if id(_tensor(module, key)) in given}
            self._places = [place for place in self._places if place[0] not in self._used]
        return result


def _tensor(module: nn.Module, key: str) -> Tensor | None:
    return module._parameters.get(key, module._buffers.get(key))


def _content(module: nn.Module, key: str) -> tuple[int, int]:
    """What changes where a buffer is written to, or replaced; no value is read."""
    buffer = module._buffers.get(key)
    return (0, 0) if buffer is None else (buffer.data_ptr(), write_count(buffer))


def _reads_values(func: Any, result: Any) -> bool:
    name = getattr(func, "__name__", "")
    if name == "__get__":  # an attribute
        return isinstance(result, Tensor) and getattr(func.__self__, "__name__", "") not in _GRADIENTS
    return name not in _METADATA
