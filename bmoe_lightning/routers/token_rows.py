"""The rows and positions of the tokens that a router sees, from the attention mask of the model's call."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from bmoe_lightning.experts.threads import applies, scope
from bmoe_lightning.experts.wrappers.transformers import imported_class, outermost_pretrained
from bmoe_lightning.routers.scores import at_least_float32
from bmoe_lightning.routers.types import Router

# What a model of transformers takes: ids or embeddings, with the mask of each.
_INPUTS = (
    (("input_ids", "inputs_embeds"), "attention_mask"),
    (("decoder_input_ids", "decoder_inputs_embeds"), "decoder_attention_mask"),
)
_MASKS = frozenset(mask for _, mask in _INPUTS)
# Parts of the names of arguments with one number for each token that are no masks.
_NO_MASKS = ("label", "target", "position", "segment", "type", "ids")


@dataclass(frozen=True)
class TokenRows:
    """The tokens of one call of a model, in rows.

    Attributes:
        mask: `[R, T]` bool, False for padding.
        positions: Position of each token in its row, counted from the row's first real token, or in its sequence where
            several share a row, `[R, T]` int64; 0 for padding before it.
        is_shared: Whether sequences share the rows.
    """

    mask: Tensor
    positions: Tensor
    is_shared: bool = False

    def equals(self, other: TokenRows) -> bool:
        """Whether padding and positions are the same."""
        return torch.equal(self.mask, other.mask) and torch.equal(self.positions, other.positions)

    @cached_property
    def num_positions(self) -> int:
        """One more than the largest position."""
        # Once for all routers: on an accelerator it waits for the positions.
        return int(self.positions.max()) + 1 if self.positions.numel() else 0

    @cached_property
    def real(self) -> Tensor | None:
        """Indices of the real tokens among all, `[real tokens]`; None if there is no padding."""
        flat = self.mask.flatten()
        return None if bool(flat.all()) else flat.nonzero().squeeze(1)

    @property
    def last(self) -> Tensor | None:
        """Index of the last real token of each row among all tokens, `[R]`; of the last one in a row without any.

        None where sequences share a row, in which that is the end of any of them.
        """
        if self.is_shared:
            return None
        length = self.mask.shape[1]
        places = torch.arange(length, device=self.mask.device)
        last = torch.where(self.mask.any(1), (self.mask * places).amax(1), length - 1)
        return last + length * torch.arange(len(last), device=last.device)

    @classmethod
    def of_mask(cls, mask: Tensor, length: int | None = None) -> TokenRows:
        """Rows of an attention mask `[R, T]`.

        Args:
            mask: 1 or True for real tokens.
            length: Number of tokens in each row, if that is less: those before are in a cache.
        """
        real = mask.bool()
        positions = (real.long().cumsum(1) - 1).clamp(min=0)
        start = 0 if length is None else real.shape[1] - length
        return cls(real[:, start:], positions[:, start:])

    @classmethod
    def of_attention(cls, attention: Tensor, positions: Tensor) -> TokenRows:
        """Rows in which sequences share their beginning, such as choices after one prompt.

        Args:
            attention: Which token sees which, `[R, 1, T, T]`: bool, or zero for True. A token that sees itself alone,
                and that no other one sees, is padding.
            positions: Position of each token in its sequence, `[R, T]` int64.
        """
        sees = attention[:, 0] if attention.dtype == torch.bool else attention[:, 0] == 0
        real = (sees.sum(2) > 1) | (sees.sum(1) > 1)
        return cls(real, positions.clamp(min=0).masked_fill(~real, 0), is_shared=True)


class _Call:
    """The rows of one call of a model, and the sums of the inputs of its routers by their index, `[D]` for each run."""

    def __init__(self, rows: Sequence[TokenRows]) -> None:
        self.rows = tuple(rows)
        self.has_graph = torch.is_grad_enabled()
        self.input_sums: dict[int, list[Tensor]] = {}

    def of(self, num_tokens: int) -> list[TokenRows]:
        """The rows of as many tokens."""
        return [rows for rows in self.rows if rows.mask.numel() == num_tokens]

    def distance(self, router: Router, input_sum: Tensor) -> float:
        """The distance of the input of a router to the nearest one that it had in this call."""
        sums = [known.to(input_sum) for known in self.input_sums.get(router.index, [])]
        return min((float((known - input_sum).norm()) for known in sums), default=torch.inf)


@dataclass
class _Entered:
    """A watched module that is running.

    Attributes:
        module: The module.
        call: The call of the model that it is; None if it is a part of one.
        knows: How well it tells the padding: 0 not at all, 1 by tokens without a mask, 2 by a mask.
    """

    module: nn.Module
    call: _Call | None = None
    knows: int = 0


class TokenWatch:
    """The rows of the calls of a model: of the running one, and of those whose graph exists. See `watched_tokens`."""

    def __init__(self) -> None:
        self._last = _Call(())
        self._is_running = False
        # The graph of a call's output holds it, and nothing else does: it is there as long as a backward pass may be.
        self._earlier: list[weakref.ref[_Call]] = []
        self._entered: list[_Entered] = []
        self._parts: weakref.WeakSet[nn.Module] = weakref.WeakSet()

    @property
    def is_running(self) -> bool:
        """Whether a call of the model is running, rather than what repeats a part of one in a backward pass."""
        return self._is_running

    @property
    def has_graph(self) -> bool:
        """Whether the last call began with gradients enabled, whatever checkpoints do within it."""
        return self._last.has_graph

    def enter(self, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """A watched module starts: it is a call of the model, unless a module around it tells the padding as well."""
        known = max((entered.knows for entered in self._entered), default=0)
        is_outermost = not self._entered
        entered = _Entered(module)
        self._entered.append(entered)
        if known:
            self._parts.add(module)
        elif module in self._parts and torch._C._current_graph_task_id() != -1:
            return  # its activations are recomputed
        given = _named_arguments(module, args, kwargs)
        rows = list(_rows_of_call(given))
        has_mask = any(given.get(name) is not None for name in _MASKS)
        if not known and not has_mask:
            _check_masks(module, given)
        ids = given.get("input_ids")
        # Of hidden states within a call it is not known which are padding.
        is_hidden = not is_outermost and isinstance(ids, Tensor) and ids.is_floating_point()
        knows = 0 if not rows else 2 if has_mask else 0 if is_hidden else 1
        if is_outermost or knows > known:
            self.begin(*rows)
            entered.call, entered.knows = self._last, knows

    def leave(self, module: nn.Module, output: Any) -> None:
        """A watched module ends, with its output, or None after an exception."""
        if not any(entered.module is module for entered in self._entered):
            return
        while (entered := self._entered.pop()).module is not module:
            pass
        if entered.call is None:
            return
        self._last = entered.call
        self.end(output)
        around = next((outer.call for outer in reversed(self._entered) if outer.knows), None)
        if around is not None:
            self._last, self._is_running = around, True

    def begin(self, *rows: TokenRows) -> None:
        """Set the rows of a call: of a model whose call does not reveal them, or of the parts of one call."""
        self._earlier = [call for call in self._earlier if call() is not None]
        self._last, self._is_running = _Call(rows), True

    def end(self, output: Any) -> None:
        """End a call, after which routers run only where activations are recomputed.

        Args:
            output: What the call returned; None after an exception.
        """
        self._is_running = False
        nodes = [value.grad_fn for value in tree_leaves(output) if isinstance(value, Tensor)]
        graph = [node for node in nodes if node is not None]
        for node in graph:
            metadata: Any = node.metadata  # a dictionary, whatever its annotation says
            metadata.setdefault(__name__, []).append(self._last)
        if graph:
            self._earlier.append(weakref.ref(self._last))

    def rows(self, num_tokens: int, router: Router | None = None, inputs: Tensor | None = None) -> TokenRows:
        """The rows of the tokens of a router.

        Where activations are recomputed for gradients, a router runs after the call. Of several calls with as many
        tokens it is the one in which the router had this input.

        Args:
            num_tokens: Number of tokens that the router got.
            router: The router.
            inputs: Its input, `[tokens, D]`.

        Raises:
            RuntimeError: If no input of the call has as many tokens, or two have that differ.
        """
        earlier = [call for call in (known() for known in self._earlier) if call is not None]
        calls = [self._last] if self._is_running or not earlier else earlier
        found = {call: call.of(num_tokens) for call in calls if call.of(num_tokens)}
        if not found:
            shapes = dict.fromkeys(rows.mask.shape for call in calls for rows in call.rows)
            seen = " and ".join(f"{rows} x {length}" for rows, length in shapes) or "no known"
            raise RuntimeError(
                f"a router got {num_tokens} tokens, and the model was called with {seen} tokens, so the padding among "
                "them is not known; call the model with input_ids or inputs_embeds and attention_mask as keywords"
            )
        if any(not rows[0].equals(other) for rows in found.values() for other in rows[1:]):
            raise RuntimeError(
                f"a router got {num_tokens} tokens, and two inputs of the model have as many with different padding; "
                "pad them to different lengths"
            )
        input_sum = None if router is None or inputs is None else at_least_float32(inputs.detach()).sum(0)
        if router is not None and input_sum is not None and self._is_running and self._last.has_graph:
            self._last.input_sums.setdefault(router.index, []).append(input_sum)
        first = next(iter(found.values()))[0]
        if all(first.equals(rows[0]) for rows in found.values()):
            return first
        if router is None or input_sum is None:
            raise RuntimeError(
                f"a router got {num_tokens} tokens after several calls of the model with as many and different "
                "padding, and without its input it is not known in which of them; pass the router and its input"
            )
        distances = {call: call.distance(router, input_sum) for call in found}
        return found[min(distances, key=distances.__getitem__)][0]


@contextmanager
def watched_tokens(model: nn.Module, inside: Iterable[str] = ()) -> Iterator[TokenWatch]:
    """Watch the calls of the models of transformers in a module.

    If there are none, calls of the module and of those within it that hold its routers: what counts is the outermost
    one that is called with tokens, and one within it that is called with an attention mask if that one is not.

    Arguments are seen by their names, and the ids also as the first positional one. Without an attention mask all
    tokens are real, and a mask of another name is refused. The model may be called several times before a backward
    pass that recomputes activations. Applies in this thread, unless within
    `bmoe_lightning.experts.threads.in_all_threads`.

    Args:
        model: Any module.
        inside: Names of the routers, or of other modules, of which the calls are to be seen.
    """
    watch, thread, active = TokenWatch(), scope(), [True]

    def hook(module: nn.Module, args: tuple[Any, ...], *rest: Any) -> None:
        if active and applies(thread) and rest:
            watch.enter(module, args, rest[0])

    def leave(module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        if active and applies(thread):
            watch.leave(module, output)

    with ExitStack() as stack:
        stack.callback(active.clear)
        owners: Sequence[nn.Module] = outermost_pretrained(model) or _holders(model, inside)
        for owner in owners:
            stack.callback(owner.register_forward_pre_hook(hook, with_kwargs=True).remove)
            stack.callback(owner.register_forward_hook(leave, always_call=True).remove)
        yield watch


def _holders(model: nn.Module, inside: Iterable[str]) -> list[nn.Module]:
    """A module, and those in it that hold others of these names."""
    names = dict.fromkeys(
        ".".join(parts[:length]) for parts in (name.split(".") for name in inside) for length in range(len(parts))
    )
    return list(dict.fromkeys([model, *map(model.get_submodule, names)]))


def _named_arguments(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by their names, with the first positional one as ids if none are given."""
    given: dict[str, Any] = {}
    if args:
        parameters = inspect.signature(module.forward).parameters.values()
        positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        names = [parameter.name for parameter in parameters if parameter.kind in positional]
        names += [f"argument {number}" for number in range(len(names) + 1, len(args) + 1)]
        given = dict(zip(names, args, strict=False))
    given |= kwargs
    if args and not any(isinstance(given.get(name), Tensor) for name in _INPUTS[0][0]):
        given["input_ids"] = args[0]
    return given


def _tokens(given: Mapping[str, Any], names: Sequence[str]) -> Any:
    """The first of the arguments of these names that is a tensor; None if none is."""
    return next((given[name] for name in names if isinstance(given.get(name), Tensor)), None)


def _check_masks(module: nn.Module, given: Mapping[str, Any]) -> None:
    """Refuse a module of a user's own that gets what may be a mask under another name than `attention_mask`."""
    tokens = _tokens(given, _INPUTS[0][0])
    if tokens is None or isinstance(module, imported_class("transformers.modeling_utils", "PreTrainedModel")):
        return
    for name, value in given.items():
        if not isinstance(value, Tensor) or value is tokens or value.shape != tokens.shape[:2]:
            continue
        is_mask = value.dtype == torch.bool or "mask" in name
        if not is_mask and not value.is_floating_point() and not any(part in name for part in _NO_MASKS):
            is_mask = bool(((value == 0) | (value == 1)).all()) and bool(value.any())
        if is_mask:
            raise RuntimeError(
                f"{type(module).__name__} was called with {name!r}, which may be the mask of its padding and is not "
                "named attention_mask, so the padding among its tokens is not known; pass the mask as the keyword "
                "attention_mask"
            )


def _rows_of_call(given: Mapping[str, Any]) -> Iterator[TokenRows]:
    for names, mask_name in _INPUTS:
        inputs = _tokens(given, names)
        if inputs is None or inputs.dim() < 2:
            continue
        mask = given.get(mask_name)
        if mask is None:
            mask = inputs.new_ones(inputs.shape[:2], dtype=torch.bool)
        rows, length = inputs.shape[:2]
        places = given.get("position_ids")
        if isinstance(mask, Tensor) and mask.shape == (rows, 1, length, length) and isinstance(places, Tensor):
            yield TokenRows.of_attention(mask, places)
        elif isinstance(mask, Tensor) and mask.dim() == 2 and len(mask) == rows and mask.shape[1] >= length:
            yield TokenRows.of_mask(mask, length)
