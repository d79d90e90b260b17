"""Bayesian LoRA: a Laplace posterior over the matrices A and B of a model that was fine-tuned with LoRA."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

from bmoe_lightning.curvature.spec import Curvature, ExpertLayers, LoRALayers
from bmoe_lightning.laplace.prior import Scope
from bmoe_lightning.methods.laplace_lpo import LaplaceLPO
from bmoe_lightning.methods.needs import Needs
from bmoe_lightning.methods.options import option


@dataclass(frozen=True)
class BayesianLoRA(LaplaceLPO):
    """Laplace posterior over LoRA's A and B in every adapted layer; prior precision from validation NLL (LPO).

    Yang et al. 2024, Bayesian Low-rank Adaptation for Large Language Models, with the posterior over all adapted layers
    (LA): one prior precision, fitted on held-out labels, and Monte Carlo averages of the probabilities. A curvature
    whose rank is at least LoRA's represents the small side of every matrix exactly.

    Raises:
        ValueError: If the curvature selects layers that are no matrices of LoRA, or as `LaplaceLPO`.
    """

    name: str = "bayesian_lora"
    label: str = "Bayesian-LoRA"
    scope: Scope = option(
        "global", "Scope of the prior precision: a single one (`global`), or one per matrix (`layer`)."
    )

    source = "https://arxiv.org/abs/2308.13111"
    cost = "one forward pass and K - 1 backward passes to the outputs of A and B"

    @property
    def needs(self) -> Needs:
        return replace(super().needs, lora=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        # The default selection is that of a `Curvature` of which other options were given.
        if self.curvature is not None and not isinstance(self.curvature.layers, LoRALayers):
            if self.curvature.layers != ExpertLayers():
                raise ValueError(
                    f"the posterior of {self.name} is over the matrices of LoRA, and its curvature selects "
                    f"{self.curvature.layers}; give layers=LoRALayers(), or use laplace_lpo with that curvature"
                )
            object.__setattr__(self, "curvature", replace(self.curvature, layers=LoRALayers()))

    def with_defaults(self, curvature: Curvature) -> Self:
        """The method with its curvature, by default the run's, applied to the matrices of LoRA."""
        if self.curvature is not None:
            return self
        layers = curvature.layers if isinstance(curvature.layers, LoRALayers) else LoRALayers()
        skipped = curvature.skip_layers if isinstance(curvature.layers, LoRALayers) else ()
        return replace(self, curvature=replace(curvature, layers=layers, skip_layers=skipped))
