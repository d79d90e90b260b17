"""One batch through a model whose expert layers are tapped: logits with their graph, and the slots of each layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from bmoe_lightning.experts.counted_batch import count_of, plain_batch
from bmoe_lightning.experts.fsdp import runs_in_lockstep, unsharded_roots
from bmoe_lightning.experts.gradient_checkpointing import recomputed_activations
from bmoe_lightning.experts.logits_contract import ClassLogits, present_classes, run_class_logits
from bmoe_lightning.experts.model_state import evaluation_mode, frozen_parameters
from bmoe_lightning.experts.module_tree import all_parameters, modules_collected
from bmoe_lightning.experts.sharded_calls import BackwardPasses
from bmoe_lightning.experts.taps import Taps
from bmoe_lightning.experts.threads import model_lock
from bmoe_lightning.experts.types import ExpertLayer
from bmoe_lightning.experts.wrappers.compiled import eager_code
from bmoe_lightning.experts.wrappers.quantised import gradients_checked
from bmoe_lightning.utils.distributed import failing_together


@dataclass(frozen=True)
class TappedBatch:
    """One batch after the forward pass of a tapped model, with its graph.

    Attributes:
        logits: Logits `[B, K]`, with graph; 0 for absent classes, so that no infinity enters a product.
        present: Mask `[B, K]`, False for absent classes.
        labels: Labels as `class_logits` returned them, or None.
        taps: The slots and their gradients.
        num_counted: Number of examples, from the first, that are counted (see `CountedBatch`).
    """

    logits: Tensor
    present: Tensor
    labels: Tensor | None
    taps: Taps
    num_counted: int

    def counts(self, device: torch.device) -> Tensor:
        """Mask `[B]` of the examples that are counted."""
        return torch.arange(len(self.logits), device=device) < self.num_counted

    def passes(self, weights: Tensor) -> Tensor:
        """Weights `[P, B, K]` of backward passes, and zeros for those that only other ranks in lockstep make."""
        return pad(weights, (0, 0, 0, 0, 0, self.taps.agreed_maximum(len(weights)) - len(weights)))

    @property
    def most_classes(self) -> int:
        """Number of classes of the example that has the most; on ranks that run in lockstep, of all their examples."""
        return self.taps.agreed_maximum(int(self.present.sum(1).max()) if len(self.present) else 0)

    @property
    def log_probs(self) -> Tensor:
        """`[B, K]` float64 log-probabilities of the MAP model, `-inf` for absent classes, without graph."""
        return self.logits.detach().double().masked_fill(~self.present, -torch.inf).log_softmax(-1)


@contextmanager
def tapped_batch(
    model: nn.Module, layers: Sequence[ExpertLayer], class_logits: ClassLogits, batch: Any, *, frozen: bool = True
) -> Iterator[TappedBatch]:
    """Run a batch with tapped expert layers, in evaluation mode, by default with frozen parameters.

    Modes, `requires_grad` flags, the experts implementation and `.grad` are restored afterwards, also after an
    exception. The model's lock is held meanwhile, and only this thread's calls of the model are tapped.

    Where weights are sharded, this is a collective, and so is each backward pass: if the block raises on one rank, all
    raise, the others at their next backward pass or at the end of the block.

    Args:
        model: The model.
        layers: The expert layers to tap.
        class_logits: Function `(model, batch) -> (logits [B, K], labels [B] or None)`.
        batch: Batch as `class_logits` takes it, or a `CountedBatch`.
        frozen: Whether no parameter requires gradients meanwhile. Otherwise the graph reaches those that do, for which
            more activations are stored.

    Raises:
        ValueError: If `class_logits` does not return logits (wrong shape, NaN, probabilities).
        RuntimeError: If no layer is reached, or the logits have no graph.
        OtherRankError: If another rank has failed, and the weights are sharded.
    """
    with ExitStack() as stack:
        stack.enter_context(model_lock(model))
        # Inference tensors cannot be part of a graph, so inference mode is left and the batch copied.
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        with modules_collected(model):
            stack.enter_context(evaluation_mode(model))
            if frozen:
                stack.enter_context(frozen_parameters(model))
            stack.enter_context(unsharded_roots(model))
            passes = BackwardPasses() if runs_in_lockstep(model) else None
            taps = Taps(layers, passes)
            stack.enter_context(taps.attach(model))
            stack.enter_context(gradients_checked(model))
            stack.enter_context(recomputed_activations(model))
        # Compiled code skips taps.
        stack.enter_context(eager_code())
        with nullcontext() if passes is None else passes.through(model):
            logits, labels = run_class_logits(class_logits, model, plain_batch(batch))
        stack.enter_context(failing_together(distributed=passes is not None))
        taps.notice(logits, *all_parameters(model))
        taps.finish_recording()
        present = present_classes(logits)
        # A caller's autocast applies to the model alone, not to computations on its slots.
        stack.enter_context(torch.autocast(logits.device.type, enabled=False))
        num_counted = count_of(batch, len(logits))
        yield TappedBatch(torch.where(present, logits, 0), present, labels, taps, num_counted)
