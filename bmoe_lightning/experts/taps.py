"""Taps: for every slot of every expert layer, the input and output of `down_proj`, and the gradient at its output.

A *slot* is one routed token: a (token, expert) pair that the router chose. Shapes: `S` slots of one layer, `B`
examples, `K` classes.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bmoe_lightning.experts.gradient_scale import GradientScale, runs_float16
from bmoe_lightning.experts.interception import intercepted_layers
from bmoe_lightning.experts.module_tree import module_at
from bmoe_lightning.experts.sharded_calls import BackwardPasses
from bmoe_lightning.experts.streaming import Collector, Output, differentiated, joined
from bmoe_lightning.experts.threads import in_this_thread
from bmoe_lightning.experts.types import ExpertLayer
from bmoe_lightning.experts.wrappers.accelerate import execution_device
from bmoe_lightning.experts.wrappers.transformers import outermost_pretrained
from bmoe_lightning.experts.write_counts import write_count
from bmoe_lightning.utils.distributed import gather_number

_INPUTS = ("input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds")


@dataclass(frozen=True)
class Slots:
    """The slots of one expert layer in one batch, in no particular order.

    Attributes:
        inputs: Input of `down_proj`, `[S, d_in]`, detached, in the model's dtype.
        experts: Expert of each slot, `[S]` int64.
        rows: Row of the model's input that contains the slot's token, `[S]` int64, counted over all calls of the model
            in this batch; None where it is unknown.
    """

    inputs: Tensor
    experts: Tensor
    rows: Tensor | None


@dataclass
class _LayerTap:
    """Collects the slots of one layer; several records when experts are separate modules or are called repeatedly."""

    source: Taps
    layer: ExpertLayer
    inputs: list[Tensor] = field(default_factory=list)
    experts: list[Tensor] = field(default_factory=list)
    rows: list[Tensor | None] = field(default_factory=list)
    outputs: list[Output] = field(default_factory=list)
    write_counts: list[int] = field(default_factory=list)

    def check_inputs(self) -> None:
        """Refuse inputs that were modified in place after `down_proj` ran: the record would be wrong."""
        if [write_count(inputs) for inputs in self.inputs] != self.write_counts:
            raise RuntimeError(
                f"the model writes in place to the input of down_proj in {self.layer.name!r} after it ran; replace "
                "that by an out-of-place operation"
            )

    def join(self) -> None:
        """Concatenate the records, and free them."""
        rows = [row for row in self.rows if row is not None]
        self.rows = [joined(rows) if len(rows) == len(self.rows) else None]
        self.inputs, self.experts = [joined(self.inputs)], [joined(self.experts)]

    def record(
        self, inputs: Tensor, experts: Tensor, outputs: Tensor, tokens: Tensor | None, num_tokens: int
    ) -> Tensor:
        if inputs.shape[-1] != self.layer.d_in:
            raise RuntimeError(
                f"down_proj of {self.layer.name!r} got {inputs.shape[-1]} of its {self.layer.d_in} inputs: it is "
                "sharded by tensor parallelism, which is not supported; load the model without a parallel plan"
            )
        if not torch.is_grad_enabled():
            raise RuntimeError(
                f"the expert layer {self.layer.name!r} ran without gradients: class_logits must not run it under "
                "torch.no_grad(), not even in one of several calls, nor with reentrant gradient checkpointing "
                "(use_reentrant=False works)"
            )
        if not outputs.requires_grad:
            # With frozen parameters the graph begins at the first tapped layer: activations below it are not saved.
            outputs = outputs.detach().requires_grad_()
        if not self.source.recording:
            return outputs
        self.source.notice(inputs, outputs)
        self.inputs.append(inputs.detach())
        self.write_counts.append(write_count(inputs))
        self.experts.append(experts)
        self.rows.append(self.source.rows_of(tokens, num_tokens))
        passes = self.source.passes
        self.outputs.append(Output(outputs, 0 if passes is None else passes.num_calls))
        return outputs


class Taps:
    """The recorded slots of one batch. Created by `tapped_batch`.

    Attributes:
        layers: The tapped layers.
        num_rows: Number of input rows of the model, over all calls.
        recording: Whether slots are recorded. False after the forward pass, when only checkpointed activations are
            recomputed, whose slots were recorded already.
        scale: Scale of the backward passes; None unless float16 is part of them.
        passes: The backward passes, if ranks run them in lockstep.
    """

    def __init__(self, layers: Sequence[ExpertLayer], passes: BackwardPasses | None = None) -> None:
        self.layers = tuple(layers)
        self.passes = passes
        self.num_rows = 0
        self.recording = True
        self.scale: GradientScale | None = None
        self._missing_anywhere: bool | None = None
        self._call = (0, frozenset[int]())
        self._modules: list[nn.Module] = []
        # Weak references: otherwise a batch and its graph would live until the garbage collector runs.
        self._layer_taps = [_LayerTap(weakref.proxy(self), layer) for layer in layers]

    def begin_call(self, num_rows: int, token_counts: Iterable[int]) -> None:
        """Record a call of the model on `num_rows` rows, and the number of tokens in each of its inputs."""
        self._call = (num_rows, frozenset(token_counts))
        self.num_rows += num_rows

    def rows_of(self, tokens: Tensor | None, num_tokens: int) -> Tensor | None:
        """The input row `[S]` of flattened tokens `[S]`, or None where the shapes of the call are ambiguous."""
        num_rows, token_counts = self._call
        if tokens is None or num_tokens not in token_counts:
            return None
        return self.num_rows - num_rows + tokens // (num_tokens // num_rows)

    def notice(self, *tensors: Tensor) -> None:
        """Scale the backward passes if tensors of the forward pass show that they run in float16."""
        if self.scale is None and runs_float16(*tensors):
            self.scale = GradientScale()

    def finish_recording(self) -> None:
        """End the forward pass: anything that runs later is recomputation.

        Raises:
            RuntimeError: If the model has modified the input of a `down_proj` in place after it ran.
        """
        self.recording = False
        for tap in self._layer_taps:
            tap.check_inputs()

    def slots(self, position: int) -> Slots:
        """The slots of the layer at a position of `layers`; empty if the batch does not reach it.

        Raises:
            RuntimeError: If the batch reaches no layer at all.
        """
        tap = self._layer_taps[position]
        layer = self.layers[position]
        if not tap.inputs:
            empty = self._empty(position, layer.d_in)
            none = torch.empty(0, dtype=torch.int64, device=empty.device)
            return Slots(empty, none, none)
        tap.join()
        return Slots(tap.inputs[0], tap.experts[0], tap.rows[0])

    def _empty(self, position: int, width: int) -> Tensor:
        """`[0, width]`, on the device of a layer that the batch does not reach."""
        for tap in self._layer_taps:
            if tap.inputs:
                device = execution_device(self._modules[position])
                like = tap.inputs[0]
                return like.new_empty(0, width, device=like.device if device.type == "meta" else device)
        raise RuntimeError(
            f"no token was routed through the expert layer {self.layers[0].name!r} or any other; class_logits must run "
            "the model that it gets, and no copy of it"
        )

    def gradients(self, outputs: Tensor, weights: Tensor, positions: Sequence[int] | None = None) -> list[Tensor]:
        """Gradients of a weighted sum of logits with respect to the outputs of `down_proj`.

        Args:
            outputs: Logits of this batch, `[B, K]`.
            weights: Weight of each logit in the sum, `[B, K]`.
            positions: Positions of the layers in `layers`; None for all.

        Returns:
            One `[S, d_out]` tensor for each layer, in the order of `slots`, in the model's dtype; in float32 where the
            backward pass runs in float16.

        Raises:
            RuntimeError: If the logits carry no graph, or gradients overflow in float16.
        """
        return list(self._each_gradient(outputs, weights, positions))

    def _each_gradient(
        self, outputs: Tensor, weights: Tensor, positions: Sequence[int] | None = None
    ) -> Iterator[Tensor]:
        """The gradients of `gradients`; each is joined and unscaled when it is asked for, and not stored."""
        check_graph(outputs)
        positions = range(len(self.layers)) if positions is None else positions
        chunks = [self._layer_taps[position].outputs for position in positions]
        flat = [output for outputs_of_layer in chunks for output in outputs_of_layer]
        scale = self.scale
        if scale is None:
            found = list(self._differentiated(outputs, weights.to(outputs.dtype), flat))
        else:
            found = list(scale.differentiated(outputs, weights.double(), flat, self.agreed, self._differentiated))
        at = 0
        for position, of_layer in zip(positions, chunks, strict=True):
            pairs = zip(found[at : at + len(of_layer)], of_layer, strict=True)
            parts = [output.zeros() if gradient is None else gradient for gradient, output in pairs]
            found[at : at + len(of_layer)] = [None] * len(of_layer)
            at += len(of_layer)
            gradient = joined(parts) if parts else self._empty(position, self.layers[position].d_out)
            yield gradient if scale is None else scale.unscaled(gradient)

    def smallest_gradient(self, position: int) -> float:
        """The smallest gradient of a layer that the last pass represented with full precision; 0 outside of float16.

        With autocast, part of the backward pass runs in float32, where gradients do not underflow.
        """
        outputs = self._layer_taps[position].outputs
        in_float16 = self.scale is not None and any(output.dtype == torch.float16 for output in outputs)
        return self.scale.smallest if self.scale is not None and in_float16 else 0.0

    def agreed(self, found: bool) -> bool:
        """Whether a condition holds on all ranks that run in lockstep, so that all make the same backward passes."""
        return found if self.passes is None else min(gather_number(int(found))) == 1

    def agreed_maximum(self, number: int) -> int:
        """The largest of the ranks' numbers, if they run in lockstep."""
        return number if self.passes is None else max(gather_number(number))

    def stream_gradients(self, outputs: Tensor, weights: Tensor, consume: Callable[[int, Tensor], None]) -> None:
        """As `gradients`, but each layer's gradient is consumed as soon as it is computed, and not stored.

        Args:
            outputs: Logits of this batch, `[B, K]`.
            weights: Weight of each logit in the sum, `[B, K]`.
            consume: Function of a position in `layers` and the gradient `[S, d_out]`, in the order of `slots`; called
                once for each layer, the last layer first.

        Raises:
            RuntimeError: If the logits carry no graph, or gradients overflow in float16.
        """
        check_graph(outputs)
        if self.scale is not None:
            # Nothing may be consumed before it is known that the pass did not overflow.
            backwards = range(len(self.layers))[::-1]
            for position, gradient in zip(backwards, self._each_gradient(outputs, weights, backwards), strict=True):
                with torch.no_grad():
                    consume(position, gradient)
            return
        collectors = [Collector(position, tap.outputs, consume) for position, tap in enumerate(self._layer_taps)]
        outputs_of_layers = [tap.outputs for tap in self._layer_taps]
        flat = [output for of_layer in outputs_of_layers for output in of_layer]
        weights = weights.to(outputs.dtype)
        # The graph begins at the leaves, so their gradients pass through all other outputs; or below the first layer,
        # where parameters are not frozen.
        leaves = [output for output in flat if output.is_leaf] or next(filter(None, outputs_of_layers), [])
        with ExitStack() as stack:
            for collector in collectors:
                collector.listen(stack)
            self._differentiated(outputs, weights, leaves)
        # Outputs on no path to a leaf depend on another tensor that requires gradients, or affect no logit.
        missing = [output for collector in collectors for output in collector.missing()]
        if self._missing_anywhere is None:  # the same in all passes through this graph
            self._missing_anywhere = self.agreed_maximum(len(missing)) > 0
        # In lockstep the leaves too, so that all ranks make the same all-gathers.
        targets = missing if self.passes is None else [*missing, *leaves]
        gradients = iter(self._differentiated(outputs, weights, targets) if self._missing_anywhere else ())
        for collector in collectors:
            collector.finish(gradients, lambda at: self._empty(at, self.layers[at].d_out))

    def _differentiated(self, outputs: Tensor, weights: Tensor, targets: Sequence[Output]) -> tuple[Tensor | None, ...]:
        """Gradients as of `differentiated`, in a backward pass of all ranks together if they run in lockstep."""
        first = min((target.num_calls for target in targets), default=0)
        with nullcontext() if self.passes is None else self.passes.together(first):
            return differentiated(outputs, weights, targets) if targets else ()

    def attach(self, model: nn.Module) -> ExitStack:
        """Register hooks in a model; closing the returned stack removes them."""
        stack = ExitStack()
        self._modules = [module_at(model, layer.module_name) for layer in self.layers]
        try:
            for owner in outermost_pretrained(model):
                hook = in_this_thread(self._see_call)
                stack.callback(owner.register_forward_pre_hook(hook, with_kwargs=True).remove)
            stack.enter_context(intercepted_layers(model, self.layers, taps=self._layer_taps))
        except BaseException:
            stack.close()
            raise
        return stack

    def _see_call(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self.recording:
            return
        inputs = [kwargs[name] for name in _INPUTS if isinstance(kwargs.get(name), Tensor)]
        inputs += [arg for arg in args[:1] if isinstance(arg, Tensor)]
        shapes = [tuple(x.shape[:2]) for x in inputs if x.dim() > 1]
        rows = {shape[0] for shape in shapes}
        if len(rows) == 1:
            self.begin_call(rows.pop(), map(math.prod, shapes))
        else:
            self.begin_call(0, ())


def check_graph(outputs: Tensor) -> None:
    """Check that logits carry a graph.

    Raises:
        RuntimeError: If they do not.
    """
    if not outputs.requires_grad:
        raise RuntimeError(
            "class_logits returned logits without a graph; do not detach them, and do not run the model under "
            "torch.no_grad() or torch.inference_mode()"
        )
