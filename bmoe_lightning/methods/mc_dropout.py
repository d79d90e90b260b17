"""MC dropout (Gal and Ghahramani 2016): dropout inside the experts stays on, and predictions are averaged."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bmoe_lightning.experts import ExpertLayer, expert_dropout, find_expert_layers
from bmoe_lightning.methods.method import BatchView, Method, average_log_probs


class MCDropout(Method):
    """Averages the probabilities of several forward passes, each with other activations dropped inside the experts.

    Masks are drawn for every token and expert anew. Each batch starts from the same seed, so what is said about a batch
    does not depend on the batches before it. It is meant for a model that was fine-tuned with the same dropout.

    Args:
        layers: the model's expert layers; found by structure if left out.
        num_samples: forward passes.
        p: probability that an activation is dropped before the second linear layer of its expert.
        seed: of the masks; torch's own random stream is left alone.

    Raises:
        ValueError: if `num_samples` is below 1, or p is not in (0, 1): without dropout all passes are the same.
    """

    name = "mc_dropout"
    label = "MC dropout"

    def __init__(
        self, layers: Sequence[ExpertLayer] | None = None, num_samples: int = 10, p: float = 0.1, seed: int = 0
    ) -> None:
        if num_samples < 1:
            raise ValueError(f"MC dropout needs at least one forward pass, got num_samples={num_samples}")
        if not 0 < p < 1:
            raise ValueError(
                f"MC dropout needs a dropout probability in (0, 1), got {p}: with none, every pass is the same; leave "
                "the method out, or fine-tune and predict with expert dropout"
            )
        self.num_samples = num_samples
        self.p = p
        self.seed = seed
        self._layers = layers

    def log_probs(self, view: BatchView) -> Tensor:
        """Log-probabilities of one batch: `[B, K]` float64, `-inf` for absent classes."""
        layers = find_expert_layers(view.model) if self._layers is None else self._layers
        # One generator for all passes: with one seed a pass, two seeds side by side would share most of their masks.
        with expert_dropout(view.model, layers, self.p, seed=self.seed):
            samples = [view.forward()[0].log_softmax(-1) for _ in range(self.num_samples)]
        return average_log_probs(torch.stack(samples))

    def hyperparameters(self) -> dict[str, float]:
        """Number of passes and dropout probability."""
        return {"num_samples": self.num_samples, "dropout": self.p}
