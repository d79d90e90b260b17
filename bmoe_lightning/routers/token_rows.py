"""The rows and positions of the tokens that a router sees, from the attention mask of the model's call."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from bmoe_lightning.experts.threads import applies, scope
from bmoe_lightning.experts.wrappers.transformers import outermost_pretrained

# What a model of transformers takes: ids or embeddings, with the mask of each.
_INPUTS = (
    (("input_ids", "inputs_embeds"), "attention_mask"),
    (("decoder_input_ids", "decoder_inputs_embeds"), "decoder_attention_mask"),
)


@dataclass(frozen=True)
class TokenRows:
    """The tokens of one call of a model, in rows.

    Attributes:
        mask: `[R, T]` bool, False for padding.
        positions: Position of each token in its row, counted from the row's first real token, or in its sequence where
            several share a row, `[R, T]` int64; 0 for padding before it.
    """

    mask: Tensor
    positions: Tensor

    @cached_property
    def real(self) -> Tensor | None:
        """Indices of the real tokens among all, `[real tokens]`; None if there is no padding."""
        flat = self.mask.flatten()
        return None if bool(flat.all()) else flat.nonzero().squeeze(1)

    @property
    def last(self) -> Tensor:
        """Index of the last real token of each row among all tokens, `[R]`; of the last one in a row without any."""
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
        return cls(real, positions.clamp(min=0).masked_fill(~real, 0))


class TokenWatch:
    """The rows of the last call of a model. Created by `watched_tokens`."""

    def __init__(self) -> None:
        self._calls: list[TokenRows] = []

    def begin(self, *rows: TokenRows) -> None:
        """Set the rows of a call: of a model whose call does not reveal them, or of the parts of one call."""
        self._calls = list(rows)

    def rows(self, num_tokens: int) -> TokenRows:
        """The rows of the tokens of a router.

        Args:
            num_tokens: Number of tokens that the router got.

        Raises:
            RuntimeError: If no input of the call has as many tokens, or two have that differ.
        """
        found = [rows for rows in self._calls if rows.mask.numel() == num_tokens]
        if not found:
            seen = " and ".join(f"{rows.mask.shape[0]} x {rows.mask.shape[1]}" for rows in self._calls) or "no known"
            raise RuntimeError(
                f"a router got {num_tokens} tokens, and the model was called with {seen} tokens, so the padding among "
                "them is not known; call the model with input_ids or inputs_embeds and attention_mask as keywords"
            )
        if any(not torch.equal(rows.mask, found[0].mask) for rows in found[1:]):
            raise RuntimeError(
                f"a router got {num_tokens} tokens, and two inputs of the model have as many with different padding; "
                "pad them to different lengths"
            )
        return found[0]


@contextmanager
def watched_tokens(model: nn.Module) -> Iterator[TokenWatch]:
    """Watch the calls of the models of transformers in a module, or of the module itself if there are none.

    Of the arguments only those are seen that are given as keywords, and the ids if they are the first positional one.
    Without an attention mask all tokens are real. Applies in this thread, unless within
    `bmoe_lightning.experts.threads.in_all_threads`.

    Args:
        model: Any module.
    """
    watch, thread, active = TokenWatch(), scope(), [True]

    def hook(_module: nn.Module, args: tuple[Any, ...], *rest: Any) -> None:
        if active and applies(thread) and rest:
            watch.begin(*_rows_of_call(args, rest[0]))

    with ExitStack() as stack:
        stack.callback(active.clear)
        owners: Sequence[nn.Module] = outermost_pretrained(model) or [model]
        for owner in owners:
            stack.callback(owner.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield watch


def _rows_of_call(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[TokenRows]:
    given = {**kwargs}
    if args and "input_ids" not in given:
        given["input_ids"] = args[0]
    for names, mask_name in _INPUTS:
        inputs = next((given[name] for name in names if isinstance(given.get(name), Tensor)), None)
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
