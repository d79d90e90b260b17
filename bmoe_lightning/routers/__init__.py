"""Routers of expert layers: find them in a model, measure what they do, and replace their logits while it runs."""

from bmoe_lightning.routers.discovery import find_routers, locate_routers
from bmoe_lightning.routers.interception import RouterError, intercepted_routers
from bmoe_lightning.routers.probe import ProbedRouter, examine_routers, probe_routers
from bmoe_lightning.routers.scores import MeanScores, check_score, log_scores, mean_scores, sample_chunks
from bmoe_lightning.routers.streams import NoiseKind, sample_noise, step_noise
from bmoe_lightning.routers.token_rows import TokenRows, TokenWatch, watched_tokens
from bmoe_lightning.routers.types import Replace, Router, Score

__all__ = [
    "MeanScores",
    "NoiseKind",
    "ProbedRouter",
    "Replace",
    "Router",
    "RouterError",
    "Score",
    "TokenRows",
    "TokenWatch",
    "check_score",
    "examine_routers",
    "find_routers",
    "intercepted_routers",
    "locate_routers",
    "log_scores",
    "mean_scores",
    "probe_routers",
    "sample_chunks",
    "sample_noise",
    "step_noise",
    "watched_tokens",
]
