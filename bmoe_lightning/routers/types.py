"""What is known of a router, and the function that replaces its logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

Score = Literal["softmax", "sigmoid", "other"]
"""What a router computes from its logits: unchanged under a common shift, a sigmoid of each, or something else."""

SCORES: tuple[Score, ...] = get_args(Score)
"""Scores in the order of their numbers in files."""


@dataclass(frozen=True)
class Router:
    """The linear map of one MoE layer from a token to the logits of the experts.

    Attributes:
        name: Qualified name of the router's module, as in `model.named_modules()`: the linear layer itself, or a module
            that holds its weight.
        index: Position among the routers of the model, from 0, in the order of their expert layers.
        num_experts: Number of logits N: one for each expert, and one for each other choice that the family has
            (experts that do nothing, shared experts that are weighted too).
        d_in: Width of the input of the linear map, D.
        experts: Qualified name of the module of the experts that it routes to (`ExpertLayer.module_name`).
        top_k: Number of experts of a token, K; None until it was probed (see `probe_routers`).
        score: Score of the logits; None until it was probed.
    """

    name: str
    index: int
    num_experts: int
    d_in: int
    experts: str
    top_k: int | None = None
    score: Score | None = None


Replace = Callable[[Router, Tensor, Tensor], Tensor]
"""`(router, input u [tokens, D], logits [tokens, N]) -> logits [tokens, N]`, in the dtype of the logits."""
