"""Routers of expert layers: find them in a model, replace their logits, and make them Bayesian."""

from bmoe_lightning.routers.attached import BayesianRouters, attached_routers
from bmoe_lightning.routers.base import (
    BayesianRouter,
    TrainedLogits,
    check_router_weights,
    load_router_state,
    rounded_router_fingerprints,
    router_fingerprint,
    router_state,
    trained_dtype,
)
from bmoe_lightning.routers.choices import choice_ways, injected_routers
from bmoe_lightning.routers.discovery import find_routers, locate_routers
from bmoe_lightning.routers.distribution import (
    DiagonalLogits,
    GaussianLogits,
    LogitDistribution,
    LowRankLogits,
    TriangularLogits,
    lower_triangular,
)
from bmoe_lightning.routers.draws import Draws, PositionNoise, SampleDraws, StepDraws
from bmoe_lightning.routers.dropout_inputs import DropoutInputs
from bmoe_lightning.routers.ensemble_members import EnsembleMembers
from bmoe_lightning.routers.fine_tuned_weights import FineTunedWeights
from bmoe_lightning.routers.fixed_noise import FixedNoise
from bmoe_lightning.routers.full_covariance import FullCovarianceLogits
from bmoe_lightning.routers.gaussian import GaussianRouter
from bmoe_lightning.routers.interception import RouterError, intercepted_routers
from bmoe_lightning.routers.kinds import RouterOptions
from bmoe_lightning.routers.mean_field import MeanFieldLogits
from bmoe_lightning.routers.noise_sweep import GAMMAS, NoisePlace, Stability, noise_sweep
from bmoe_lightning.routers.prediction import (
    RouterSignals,
    averaged_scores,
    mean_routers,
    recorded_signals,
    sampled_routes,
)
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
    jaccard_of_tokens,
    recorded_choices,
    susceptible_layers,
)
from bmoe_lightning.routers.streams import NoiseKind, sample_noise, step_noise
from bmoe_lightning.routers.swag_samples import SwagSamples
from bmoe_lightning.routers.temperature import CollapseWatch, TemperatureChoice
from bmoe_lightning.routers.token_rows import TokenRows, TokenWatch, watched_tokens
from bmoe_lightning.routers.training import RouterTraining, trained_routers
from bmoe_lightning.routers.types import Replace, Router, Score
from bmoe_lightning.routers.weight_noise import DropoutLogits, SwagWeights, dropout_multipliers, ensemble_logits
from bmoe_lightning.routers.weights import check_linear, router_weight

__all__ = [
    "GAMMAS",
    "BayesianRouter",
    "BayesianRouters",
    "CollapseWatch",
    "DiagonalLogits",
    "Draws",
    "DropoutInputs",
    "DropoutLogits",
    "EnsembleMembers",
    "FineTunedWeights",
    "FixedNoise",
    "FullCovarianceLogits",
    "GaussianLogits",
    "GaussianRouter",
    "LogitDistribution",
    "LowRankLogits",
    "MeanFieldLogits",
    "MeanScores",
    "NoiseKind",
    "NoisePlace",
    "PositionNoise",
    "ProbedRouter",
    "Replace",
    "Router",
    "RouterError",
    "RouterOptions",
    "RouterSignals",
    "RouterTraining",
    "SampleDraws",
    "Score",
    "Stability",
    "StepDraws",
    "SwagSamples",
    "SwagWeights",
    "TemperatureChoice",
    "TokenRows",
    "TokenWatch",
    "TrainedLogits",
    "TriangularLogits",
    "as_sets",
    "attached_routers",
    "averaged_scores",
    "chance_jaccard",
    "check_linear",
    "check_router_weights",
    "check_score",
    "choice_ways",
    "dropout_multipliers",
    "ensemble_logits",
    "examine_routers",
    "find_routers",
    "gate_entropy",
    "injected_routers",
    "intercepted_routers",
    "jaccard",
    "jaccard_by_layer",
    "jaccard_of_tokens",
    "load_router_state",
    "locate_routers",
    "log_probability",
    "log_scores",
    "lower_triangular",
    "mean_routers",
    "mean_scores",
    "noise_sweep",
    "probe_routers",
    "recorded_choices",
    "recorded_signals",
    "restrict",
    "rounded_router_fingerprints",
    "router_fingerprint",
    "router_state",
    "router_weight",
    "sample_chunks",
    "sample_experts",
    "sample_noise",
    "sampled_routes",
    "step_noise",
    "susceptible_layers",
    "tempered_divergence",
    "trained_dtype",
    "trained_routers",
    "watched_tokens",
]
