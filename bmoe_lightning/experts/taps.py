"""Read, for every slot of every expert layer, what goes in, what comes out and what the gradient there is.

A *slot* is one (token, expert) pair that the router chose. Shapes: `S` slots of one layer, `B` examples, `K` classes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bmoe_lightning.experts.fused import attached_state, fused_implementation, outermost_pretrained
from bmoe_lightning.experts.layout import ExpertLayer

ClassLogits = Callable[[Any, Any], tuple[Tensor, Tensor | None]]
"""`(model, batch) -> (logits [B, K], labels [B] or None)`; `-inf` marks a class that an example does not have."""


@dataclass(frozen=True)
class Slots:
    """The slots of one expert layer in one batch, in no particular order.

    Attributes:
        inputs: `[S, d_in]`, what enters the second linear layer, detached, in the model's dtype.
        experts: `[S]` int64.
        rows: `[S]` int64, the row of the model's input that the slot's token stands in, counted over all calls of the
            model in this batch; None where the model's own code hides it.
    """

    inputs: Tensor
    experts: Tensor
    rows: Tensor | None


@dataclass
class _LayerTap:
    """Collects the slots of one layer; several records when experts are separate modules or are called repeatedly."""

    source: Taps
    inputs: list[Tensor] = field(default_factory=list)
    experts: list[Tensor] = field(default_factory=list)
    rows: list[Tensor | None] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)

    def record(
        self, inputs: Tensor, experts: Tensor, outputs: Tensor, tokens: Tensor | None, num_tokens: int
    ) -> Tensor:
        if not outputs.requires_grad:
            # With frozen parameters the graph begins at the first tapped layer: nothing below it is ever kept.
            outputs = outputs.detach().requires_grad_()
        self.inputs.append(inputs.detach())
        self.experts.append(experts)
        self.rows.append(self.source.rows_of(tokens, num_tokens))
        self.outputs.append(outputs)
        return outputs


class Taps:
    """What the taps of one batch saw. Made by `tapped_batch`.

    Attributes:
        layers: the tapped layers.
        num_rows: rows of input that the model was given, over all calls.
    """

    def __init__(self, layers: Sequence[ExpertLayer]) -> None:
        self.layers = tuple(layers)
        self.num_rows = 0
        self._rows_in_call = 0
        self._layer_taps = [_LayerTap(self) for _ in layers]

    def begin_call(self, num_rows: int) -> None:
        """Note that the model is called on `num_rows` rows."""
        self._rows_in_call = num_rows
        self.num_rows += num_rows

    def rows_of(self, tokens: Tensor | None, num_tokens: int) -> Tensor | None:
        """The input row `[S]` of flattened tokens `[S]`, or None where the call's shape does not tell."""
        if tokens is None or not self._rows_in_call or num_tokens % self._rows_in_call:
            return None
        return self.num_rows - self._rows_in_call + tokens // (num_tokens // self._rows_in_call)

    def slots(self, position: int) -> Slots:
        """The slots of the layer at a position of `layers`."""
        tap = self._layer_taps[position]
        layer = self.layers[position]
        if not tap.inputs:
            raise RuntimeError(
                f"no token went through the expert layer {layer.name!r}: class_logits did not run it, or ran another "
                "copy of the model"
            )
        rows = [row for row in tap.rows if row is not None]
        known = len(rows) == len(tap.rows)
        return Slots(torch.cat(tap.inputs), torch.cat(tap.experts), torch.cat(rows) if known else None)

    def gradients(self, outputs: Tensor, weights: Tensor, positions: Sequence[int] | None = None) -> list[Tensor]:
        """Gradients of a weighted sum of outputs with respect to the second linear layers' outputs.

        Args:
            outputs: `[B, K]` logits of this batch.
            weights: `[B, K]` weight of each logit in the sum.
            positions: which layers, as positions in `layers`; None for all.

        Returns:
            One `[S, d_out]` tensor a layer, in the order of `slots`, in the model's dtype.

        Raises:
            RuntimeError: if the logits carry no graph.
        """
        if not outputs.requires_grad:
            raise RuntimeError(
                "class_logits returned logits without a graph, so nothing can be said about their derivatives: it must "
                "not detach them, nor run the model under torch.no_grad() or torch.inference_mode()"
            )
        positions = range(len(self.layers)) if positions is None else positions
        chunks = [self._layer_taps[position].outputs for position in positions]
        flat = [output for outputs_of_layer in chunks for output in outputs_of_layer]
        found = torch.autograd.grad(outputs, flat, weights.to(outputs.dtype), retain_graph=True, allow_unused=True)
        gradients = iter(
            torch.zeros_like(output) if gradient is None else gradient
            for gradient, output in zip(found, flat, strict=True)
        )
        return [torch.cat([next(gradients) for _ in outputs_of_layer]) for outputs_of_layer in chunks]

    def attach(self, model: nn.Module) -> ExitStack:
        """Hook into a model; closing the returned stack takes everything away again."""
        stack = ExitStack()
        try:
            for owner in outermost_pretrained(model):
                stack.callback(owner.register_forward_pre_hook(self._see_call, with_kwargs=True).remove)
            if any(layer.layout == "fused" for layer in self.layers):
                stack.enter_context(fused_implementation(model))
            for layer, tap in zip(self.layers, self._layer_taps, strict=True):
                experts = model.get_submodule(layer.name)
                if layer.layout == "fused":
                    stack.enter_context(attached_state(experts, tap=tap))
                    continue
                assert isinstance(experts, nn.ModuleList)
                for index, expert in enumerate(experts):
                    linear = expert.get_submodule(layer.down_proj)
                    stack.callback(linear.register_forward_hook(_module_hook(tap, index)).remove)
        except BaseException:
            stack.close()
            raise
        return stack

    def _see_call(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for name in ("input_ids", "inputs_embeds"):
            if isinstance(kwargs.get(name), Tensor):
                self.begin_call(kwargs[name].shape[0])
                return
        self.begin_call(args[0].shape[0] if args and isinstance(args[0], Tensor) else 0)


def _module_hook(tap: _LayerTap, expert: int) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    def hook(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        flat = inputs[0].reshape(-1, inputs[0].shape[-1])
        experts = torch.full((len(flat),), expert, dtype=torch.int64, device=flat.device)
        seen = tap.record(flat, experts, output.reshape(-1, output.shape[-1]), None, 0)
        return seen.view(output.shape)

    return hook


@dataclass(frozen=True)
class TappedBatch:
    """One batch that went through a tapped model, its graph still alive.

    Attributes:
        logits: `[B, K]` with graph; absent classes hold 0 here, so that no infinity enters a product.
        present: `[B, K]` bool, which classes each example has.
        labels: `[B]` int64 or None.
        taps: the slots and their gradients.
    """

    logits: Tensor
    present: Tensor
    labels: Tensor | None
    taps: Taps

    @property
    def log_probs(self) -> Tensor:
        """`[B, K]` float64 log-probabilities of the model itself, `-inf` for absent classes, without graph."""
        return self.logits.detach().double().masked_fill(~self.present, -torch.inf).log_softmax(-1)


@contextmanager
def tapped_batch(
    model: nn.Module, layers: Sequence[ExpertLayer], class_logits: ClassLogits, batch: Any
) -> Iterator[TappedBatch]:
    """Run a batch with every expert layer tapped, in evaluation mode, with frozen parameters.

    Modes, `requires_grad` flags, the experts implementation and `.grad` are as before afterwards, also after an
    exception.

    Args:
        model: the model.
        layers: which of its expert layers to tap.
        class_logits: `(model, batch) -> (logits [B, K], labels [B] or None)`.
        batch: whatever `class_logits` takes.

    Raises:
        ValueError: if what `class_logits` returns are no logits (wrong shape, NaN, probabilities).
        RuntimeError: if a layer is not reached.
    """
    taps = Taps(layers)
    with ExitStack() as stack:
        # Inference tensors cannot be part of a graph, so a caller's inference mode is left and its batch copied.
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(evaluation_mode(model))
        stack.enter_context(_frozen(model))
        stack.enter_context(taps.attach(model))
        logits, labels = class_logits(model, _without_inference_tensors(batch))
        check_logits(logits)
        present = logits.detach() != -torch.inf
        # A caller's autocast is for the model alone: what is done with its slots keeps their precision.
        stack.enter_context(torch.autocast(logits.device.type, enabled=False))
        yield TappedBatch(torch.where(present, logits, 0), present, labels, taps)


def check_logits(logits: Tensor) -> None:
    """Refuse what cannot be class logits.

    Raises:
        ValueError: if the shape is not `[B, K]` with K >= 2, a value is NaN or +inf, an example has fewer than two
            classes, or every row is a distribution.
    """
    if logits.dim() != 2 or logits.shape[1] < 2 or not logits.is_floating_point():
        raise ValueError(
            f"class_logits must return logits of shape [B, K] with K >= 2, got {logits.dtype} {tuple(logits.shape)}"
        )
    values = logits.detach().float()
    if bool(torch.isnan(values).any() | (values == torch.inf).any()):
        raise ValueError("class_logits returned NaN or +inf: the model's weights or its input are broken")
    if bool(((values != -torch.inf).sum(-1) < 2).any()):
        raise ValueError("class_logits returned an example with fewer than two classes: all others are -inf")
    if bool(((values >= 0) & (values <= 1)).all() & ((values.sum(-1) - 1).abs() < 1e-3).all()):
        raise ValueError(
            "class_logits returned probabilities (every row is non-negative and sums to 1); return the logits before "
            "the softmax"
        )


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode; every module's own mode comes back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def _without_inference_tensors(batch: Any) -> Any:
    """Copy the inference tensors of nested lists, tuples and mappings; everything else stays the same object."""
    if isinstance(batch, Tensor):
        return batch.clone() if batch.is_inference() else batch
    if isinstance(batch, MutableMapping):
        copied = copy.copy(batch)  # rather than a new one: not every mapping is made from a mapping
        for key, value in batch.items():
            copied[key] = _without_inference_tensors(value)
        return copied
    if isinstance(batch, (list, tuple)):
        values = [_without_inference_tensors(value) for value in batch]
        return type(batch)(*values) if hasattr(batch, "_fields") else type(batch)(values)
    return batch
