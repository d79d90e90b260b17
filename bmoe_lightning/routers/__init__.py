"""Routers of expert layers: find them in a model, measure what they do, and replace their logits while it runs."""

from bmoe_lightning.routers.discovery import find_routers, locate_routers
from bmoe_lightning.routers.distribution import (
    DiagonalLogits,
    GaussianLogits,
    LogitDistribution,
    LowRankLogits,
    TriangularLogits,
    lower_triangular,
)
from bmoe_lightning.routers.interception import RouterError, intercepted_routers
from bmoe_lightning.routers.probe import ProbedRouter, examine_routers, probe_routers
from bmoe_lightning.routers.scores import MeanScores, check_score, log_scores, mean_scores, sample_chunks
from bmoe_lightning.routers.selection import (
    gate_entropy,
    log_probability,
    restrict,
    sample_experts,
    tempered_divergence,
)
from bmoe_lightning.routers.stability import (
    as_sets,
    chance_jaccard,
    jaccard,
    jaccard_by_layer,
    recorded_choices,
    susceptible_layers,
)
from bmoe_lightning.routers.streams import NoiseKind, sample_noise, step_noise
from bmoe_lightning.routers.token_rows import TokenRows, TokenWatch, watched_tokens
from bmoe_lightning.routers.types import Replace, Router, Score
from bmoe_lightning.routers.weight_noise import DropoutLogits, SwagWeights, dropout_multipliers, ensemble_logits

__all__ = [
    "DiagonalLogits",
    "DropoutLogits",
    "GaussianLogits",
    "LogitDistribution",
    "LowRankLogits",
    "MeanScores",
    "NoiseKind",
    "ProbedRouter",
    "Replace",
    "Router",
    "RouterError",
    "Score",
    "SwagWeights",
    "TokenRows",
    "TokenWatch",
    "TriangularLogits",
    "as_sets",
    "chance_jaccard",
    "check_score",
    "dropout_multipliers",
    "ensemble_logits",
    "examine_routers",
    "find_routers",
    "gate_entropy",
    "intercepted_routers",
    "jaccard",
    "jaccard_by_layer",
    "locate_routers",
    "log_probability",
    "log_scores",
    "lower_triangular",
    "mean_scores",
    "probe_routers",
    "recorded_choices",
    "restrict",
    "sample_chunks",
    "sample_experts",
    "sample_noise",
    "step_noise",
    "susceptible_layers",
    "tempered_divergence",
    "watched_tokens",
]
