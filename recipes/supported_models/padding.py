"""Does padding change a row: a padded row of a tiny model against the same row alone, on both sides."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bmoe_lightning.data.batches import PaddingSide
from bmoe_lightning.models.last_logits import last_logits
from recipes.supported_models.overrides import SMALL, FamilySettings, settings_of
from recipes.supported_models.tiny import TinyFamily, random_tokens

# A multiple of a block's length may do no harm.
_PADS = (1, 2, 3, 5)
_LENGTH = 11
_DECODER_LENGTH = 3


def padding_errors(tiny: TinyFamily) -> dict[PaddingSide, float]:
    """Largest relative error of a padded row's logits against those of the row alone, by the side of the padding.

    The row is padded to the length of a second one by several numbers of tokens. The logits are those at its last
    token, over the whole vocabulary, with the attention mask and, where the model takes them, positions.
    """
    settings = settings_of(tiny.family)
    generator = torch.Generator().manual_seed(0)
    row = random_tokens((1, _LENGTH), generator)
    decoder = random_tokens((1, _DECODER_LENGTH), generator) if settings.is_encoder_decoder else None
    model = tiny.model
    if settings.padding_dtype is not None:
        model = nn.Module.to(copy.deepcopy(model), settings.padding_dtype)
    alone = _logits(model, settings, row, torch.ones_like(row), decoder)
    errors: dict[PaddingSide, float] = {"left": 0.0, "right": 0.0}
    for pad in _PADS:
        longer = random_tokens((1, _LENGTH + pad), generator)
        for side in errors:
            sides = (pad, 0) if side == "left" else (0, pad)
            padded = torch.nn.functional.pad(row, sides, value=SMALL["pad_token_id"])
            mask = torch.nn.functional.pad(torch.ones_like(row), sides)
            both = torch.cat([padded, longer]), torch.cat([mask, torch.ones_like(longer)])
            found = _logits(model, settings, *both, decoder)[:1]
            error = float(torch.linalg.vector_norm(found - alone) / torch.linalg.vector_norm(alone))
            errors[side] = max(errors[side], math.inf if math.isnan(error) else error)
    return errors


def larger_errors(first: Mapping[PaddingSide, float], second: Mapping[PaddingSide, float]) -> dict[PaddingSide, float]:
    """The larger error of each side."""
    return {side: max(error, second[side]) for side, error in first.items()}


@torch.no_grad()
def _logits(
    model: PreTrainedModel, settings: FamilySettings, ids: Tensor, mask: Tensor, decoder: Tensor | None
) -> Tensor:
    """Logits `[B, V]` float64 at the last token of each row."""
    if decoder is None:
        return last_logits(model, ids, mask).double()
    tokens = decoder.expand(len(ids), -1)
    found = model(input_ids=ids, attention_mask=mask, decoder_input_ids=tokens, **settings.call)
    return found.logits[:, -1].double()
