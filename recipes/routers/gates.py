"""The entropy of the trained gates, as a score of uncertainty beside those of the methods."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import get_args

import torch
from torch import Tensor

from bmoe_lightning.methods import BatchView, Method, Needs, Workbench
from bmoe_lightning.methods.base import State
from bmoe_lightning.routers import FixedNoise, Score, find_routers, recorded_signals

_SCORES: tuple[Score, ...] = get_args(Score)
_KEY = "score"


@dataclass(frozen=True)
class TrainedGates(Method):
    """The predictions of the fine-tuned model, with the entropy of its gates where the answer is read."""

    name: str = "trained_gates"
    label: str = "MAP, trained gates"

    @property
    def needs(self) -> Needs:
        """One held-out input, on which the routers are probed."""
        return Needs(calibration_inputs=1, routers=True)

    def fit(self, work: Workbench) -> State:
        """The kind of the scores of each router."""
        return {_KEY: torch.tensor([_SCORES.index(router.score or "other") for router in work.routers()])}

    def log_probs(self, batch: BatchView, state: State) -> Tensor:  # noqa: ARG002
        """Log-softmax of the logits `[B, K]`."""
        return batch.logits.log_softmax(-1)

    def uncertainty(self, batch: BatchView, state: State) -> dict[str, Tensor]:
        """The mean entropy over routers; none where their scores are neither a softmax nor a sigmoid."""
        scores = [_SCORES[index] for index in state[_KEY].tolist()]
        found = find_routers(batch.model)
        if "other" in scores or len(scores) != len(found):
            return {}
        gates = [FixedNoise(replace(router, score=score), 0.0) for router, score in zip(found, scores, strict=True)]
        with recorded_signals(batch.model, gates) as signals:
            batch.forward()
        entropies = [torch.cat(calls) for calls in signals.entropies.values()]
        if not entropies or any(len(of_router) != len(batch.logits) for of_router in entropies):
            return {}  # where each choice has a row of its own, or all share one
        return {"gate_entropy": torch.stack(entropies).mean(0).cpu()}


GATES = {"class_path": f"{TrainedGates.__module__}.{TrainedGates.__qualname__}", "init_args": {}}
"""The method as an item of `--methods`."""
