"""MC dropout: predictions averaged over dropout masks, inside the experts or in front of LoRA's matrices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from bmoe_lightning.curvature.spec import ExpertLayers, LayerSelection, LoRALayers
from bmoe_lightning.experts import ExpertLayer, expert_dropout
from bmoe_lightning.experts.wrappers.peft import lora_dropouts
from bmoe_lightning.methods.base import Method, State
from bmoe_lightning.methods.batch_view import BatchView
from bmoe_lightning.methods.evaluation import average_log_probs
from bmoe_lightning.methods.needs import Needs
from bmoe_lightning.methods.options import option


@dataclass(frozen=True)
class MCDropout(Method):
    """Averages the probabilities of several forward passes with different dropout masks, by default those of training.

    Masks are sampled independently for every token and expert, or every token and matrix A of LoRA. Each batch starts
    from the same seed, so its prediction does not depend on the batches before it. Gal and Ghahramani 2016, Dropout as
    a Bayesian Approximation.

    Raises:
        ValueError: If `num_samples` is below 1, or `p` is not in (0, 1): without dropout all passes are equal.
    """

    name: str = "mc_dropout"
    label: str = "MC dropout"
    p: float = option(0.1, "Probability that an activation is dropped.")
    num_samples: int = option(10, "Number of forward passes.", trial=2)
    layers: LayerSelection | None = option(
        None,
        "Layers whose inputs are dropped; by default LoRA's matrices A in a model that LoRA adapts, which was trained "
        "with that dropout, else the second linear layer of every expert.",
    )

    source = "https://arxiv.org/abs/1506.02142"
    cost = "`num_samples` forward passes"

    def __post_init__(self) -> None:
        if self.num_samples < 1:
            raise ValueError(f"MC dropout needs at least one forward pass, got num_samples={self.num_samples}")
        if not 0 < self.p < 1:
            raise ValueError(
                f"MC dropout needs a dropout probability in (0, 1), got {self.p}: without dropout all passes are "
                "equal; remove the method, or fine-tune and predict with expert dropout"
            )

    @property
    def needs(self) -> Needs:
        return Needs(expert_dropout=True)

    def check_run(
        self,
        model: nn.Module,
        folder: Path | None,
        *,
        ranks_per_node: int = 1,
        trained: Sequence[nn.Parameter] | None = None,
    ) -> None:
        """Check that there are such layers, and that LoRA is trained with the same dropout.

        Raises:
            ValueError: If there are none, or LoRA has another dropout probability.
        """
        self._dropped(model)

    def log_probs(self, batch: BatchView, state: State) -> Tensor:
        # One generator for all passes: with one seed per pass, adjacent seeds would share most of their masks.
        with expert_dropout(batch.model, self._dropped(batch.model), self.p, seed=batch.seed):
            samples = [batch.forward()[0].log_softmax(-1) for _ in range(self.num_samples)]
        return average_log_probs(torch.stack(samples))

    def hyperparameters(self, state: State) -> dict[str, float]:
        return {"num_samples": self.num_samples, "dropout": self.p}

    def _dropped(self, model: nn.Module) -> list[ExpertLayer]:
        if self.layers is not None:
            return self.layers.find(model)
        of_lora = set(lora_dropouts(model).values())
        if not of_lora:
            return ExpertLayers().find(model)
        if of_lora != {self.p}:
            raise ValueError(
                f"{self.name} predicts with a dropout probability of {self.p}, and the LoRA of this model is trained "
                f"with {', '.join(map(str, sorted(of_lora)))}; use the same one, or remove the method"
            )
        return LoRALayers("A").find(model)
