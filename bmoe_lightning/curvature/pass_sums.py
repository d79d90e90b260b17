"""The running sums of a curvature pass over all layers, to which batches are added as a whole or in parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bmoe_lightning.curvature.fisher import fisher_weights
from bmoe_lightning.curvature.layer_sums import LayerBatch, LayerSums
from bmoe_lightning.curvature.spec import Curvature
from bmoe_lightning.experts.batch_parts import joined_labels, num_values, run_in_parts
from bmoe_lightning.experts.logits_contract import ClassLogits, joined_logits
from bmoe_lightning.experts.ownership import slot_owners
from bmoe_lightning.experts.tapped_batches import TappedBatch, tapped_batch
from bmoe_lightning.experts.taps import Slots
from bmoe_lightning.experts.types import ExpertLayer
from bmoe_lightning.utils.devices import answers_at_once
from bmoe_lightning.utils.memory import is_out_of_memory


@dataclass(frozen=True)
class AddedBatch:
    """What was added to the sums.

    Attributes:
        logits: Logits `[B, K]`, `-inf` for absent classes, without graph.
        labels: Labels as `class_logits` returned them, or None.
        num_counted: Number of examples, from the first, that are counted.
        num_passes: Number of backward passes.
        batch: The batch, or the first of its parts that did fit in memory.
    """

    logits: Tensor
    labels: Any
    num_counted: int
    num_passes: int
    batch: Any


class PassSums:
    """The running sums of all layers.

    Args:
        model: The model.
        layers: The layers.
        class_logits: Function `(model, batch) -> (logits [B, K], labels [B] or None)`.
        options: Rank, Fisher, form and sketch.
        seed: Seed of random test matrices.
        generator: Generator of sampled labels.
        begun: Called once with the sums, before the first batch is added.
        checked: Whether it was checked on a batch that the model mixes no examples.

    Attributes:
        layers: The sums of each layer; none before the first batch.
        checked: As the argument, after the batches that were added.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[ExpertLayer],
        class_logits: ClassLogits,
        options: Curvature,
        *,
        seed: int,
        generator: torch.Generator,
        begun: Callable[[Sequence[LayerSums]], None],
        checked: bool,
    ) -> None:
        self.layers: list[LayerSums] = []
        self.checked = checked
        self._model = model
        self._expert_layers = layers
        self._class_logits = class_logits
        self._options = options
        self._seed = seed
        self._generator = generator
        self._begun = begun
        self._largest = 0

    def begin(self, like: Sequence[Tensor]) -> None:
        """Create the sums.

        Args:
            like: A tensor with the device and dtype of the activations of each layer.
        """
        rank, sketch = self._options.rank, self._options.sketch
        layers = [
            LayerSums(layer, values, rank, sketch, self._seed)
            for layer, values in zip(self._expert_layers, like, strict=True)
        ]
        self._begun(layers)
        self.layers = layers  # not before: what is begun may fail for lack of memory

    def add(self, batch: Any) -> AddedBatch:
        """Add a batch, in parts if it does not fit in memory (see `run_in_parts`).

        It is not cut for the sketch `rsvd`, whose result depends on the batches.

        Args:
            batch: Batch as `class_logits` takes it, or a `CountedBatch`.

        Raises:
            RuntimeError: If there was no more memory while the gradients were added, on the CPU or for a batch that is
                no larger than one that did fit; the sums are then of no use.
        """
        if self._options.sketch == "rsvd":
            parts = [self._added(batch)]
        else:
            parts = run_in_parts(
                self._model, self._class_logits, batch, self._added, _counted_logits, work="curvature pass"
            )
        self.checked = self.checked or any(len(part.logits) > 1 for part in parts)
        return AddedBatch(
            joined_logits([part.logits for part in parts]),
            joined_labels([part.labels for part in parts]),
            sum(part.num_counted for part in parts),
            max(part.num_passes for part in parts),
            parts[0].batch,
        )

    def _added(self, batch: Any) -> AddedBatch:
        drawn = self._generator.get_state()
        adding = False
        before: list[tuple[dict[str, Tensor], Tensor]] = []
        try:
            with tapped_batch(self._model, self._expert_layers, self._class_logits, batch) as tapped, torch.no_grad():
                slots = [tapped.taps.slots(position) for position in range(len(self._expert_layers))]
                if not self.layers:
                    self.begin([layer_slots.inputs for layer_slots in slots])
                    drawn = self._generator.get_state()
                weights = self._fisher_weights(tapped)
                before = self._copies(batch)
                adding = True
                _add_batch(self.layers, tapped, slots, weights, self._options.approximation, thorough=not self.checked)
                logits = torch.where(tapped.present, tapped.logits.detach(), -torch.inf)
                added = AddedBatch(logits, tapped.labels, tapped.num_counted, len(weights), batch)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            self._generator.set_state(drawn)
            if adding and not before:
                raise RuntimeError(
                    "there was no more memory while the gradients of a batch were added to the curvature, so a part of "
                    "them is in its sums; make smaller batches (a pass with a checkpoint resumes from it)"
                ) from error
            for layer, (state, underflowed) in zip(self.layers, before, strict=False):
                layer.load_state(state)
                layer.underflowed = underflowed
            raise
        self._largest = max(self._largest, num_values(batch))
        return added

    def _copies(self, batch: Any) -> list[tuple[dict[str, Tensor], Tensor]]:
        """The sums of each layer on the CPU, before a batch that may be too large for an accelerator."""
        if num_values(batch) <= self._largest or all(answers_at_once(layer.slots.device) for layer in self.layers):
            return []
        return [
            ({name: value.cpu().clone() for name, value in layer.state().items()}, layer.underflowed)
            for layer in self.layers
        ]

    def _fisher_weights(self, tapped: TappedBatch) -> Tensor:
        fisher = self._options.fisher
        most = max(2, tapped.most_classes) if fisher == "exact" else 0
        weights = fisher_weights(fisher, tapped.log_probs, tapped.labels, self._generator, most)
        return tapped.passes(weights * tapped.counts(weights.device).view(1, -1, 1))


def _counted_logits(added: AddedBatch) -> Tensor:
    return added.logits[: added.num_counted]


def _add_batch(
    sums: Sequence[LayerSums],
    tapped: TappedBatch,
    slots: Sequence[Slots],
    weights: Tensor,
    approximation: str,
    *,
    thorough: bool,
) -> None:
    """Add one batch's slots to every layer: first the gradients as they are computed, then the counted inputs."""
    owners: list[Tensor] | list[None] = [None] * len(slots)
    if approximation == "reduce":
        owners = slot_owners(tapped, slots, thorough=thorough)
    num_examples = len(tapped.logits)
    batches = [
        LayerBatch(x, layer_slots, owner, num_examples, tapped.taps.num_rows)
        for x, layer_slots, owner in zip(sums, slots, owners, strict=True)
    ]
    for pass_weights in weights:
        tapped.taps.stream_gradients(
            tapped.logits,
            pass_weights.to(tapped.logits.device),
            lambda position, gradient: batches[position].add_gradients(
                gradient, tapped.taps.smallest_gradient(position)
            ),
        )
    for batch in batches:
        batch.add_inputs()
