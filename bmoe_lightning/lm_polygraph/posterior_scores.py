"""Scores of generated text under a posterior, for lm-polygraph: a statistic, and the estimators that read it.

lm-polygraph loads both by the name of this module, without a fork: a calculator whose `builder` it is, and estimators
of this name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bmoe_lightning.laplace import ANSWER_SCORES, LaplacePosterior, score_answers
from bmoe_lightning.models import with_answers
from bmoe_lightning.utils.late_import import how_to_install

try:
    from lm_polygraph.estimators.estimator import Estimator
    from lm_polygraph.stat_calculators.stat_calculator import StatCalculator
    from lm_polygraph.utils.factory_stat_calculator import StatCalculatorContainer
except ImportError as error:
    raise ImportError(
        f"the scores of a posterior need lm-polygraph, which cannot be imported ({error}); "
        f"{how_to_install('lm-polygraph')}"
    ) from error

STATISTIC = "laplace_answer_scores"
"""Name of the statistic: a mapping of names of `ANSWER_SCORES` to arrays `[B]`."""

_NEEDED = "greedy_tokens"


class PosteriorScoresCalculator(StatCalculator):
    """Scores the greedily decoded texts of a batch under a posterior, in one forward and one backward pass.

    Args:
        posterior: The posterior, or the file that it was saved to.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not a posterior, or is damaged.
    """

    @staticmethod
    def meta_info() -> tuple[list[str], list[str]]:
        """Names of what this provides and of what it needs."""
        return [STATISTIC], [_NEEDED]

    def __init__(self, posterior: LaplacePosterior | str | Path) -> None:
        super().__init__()
        self.posterior = posterior if isinstance(posterior, LaplacePosterior) else LaplacePosterior.load(posterior)

    def __call__(
        self, dependencies: Mapping[str, Any], texts: Sequence[Any], model: Any, *_: Any, **__: Any
    ) -> dict[str, dict[str, np.ndarray]]:
        """Score the texts.

        Args:
            dependencies: Statistics of the batch, with the tokens of its texts.
            texts: Prompts.
            model: `WhiteboxModel` whose model the posterior was fitted to.

        Raises:
            WeightMismatchError: If the model has other weights.
        """
        prompts = {name: value.to(model.model.device) for name, value in model.tokenize(texts).items()}
        answers = with_answers(prompts, dependencies[_NEEDED])
        found = score_answers(model.model, answers.batch, self.posterior).uncertainties()
        return {STATISTIC: {name: value.cpu().numpy() for name, value in found.items()}}


class PosteriorScore(Estimator):
    """An uncertainty of a whole text, **higher is more uncertain**: by default its variance under the posterior.

    Args:
        score: A name of `bmoe_lightning.laplace.ANSWER_SCORES`.

    Raises:
        ValueError: If there is no such score.
    """

    def __init__(self, score: str = "posterior_variance") -> None:
        if score not in ANSWER_SCORES:
            raise ValueError(f"unknown score {score!r}; valid are {', '.join(ANSWER_SCORES)}")
        super().__init__([STATISTIC], "sequence")
        self.score = score

    def __str__(self) -> str:
        return f"Laplace_{self.score}"

    def __call__(self, stats: Mapping[str, Any]) -> np.ndarray:
        """The score of each text of a batch, `[B]`."""
        found: np.ndarray = stats[STATISTIC][self.score]
        return found


def calculator(posterior: str | Path) -> StatCalculatorContainer:
    """What `UEManager` takes among its available calculators.

    Args:
        posterior: File of the posterior.
    """
    stats, needed = PosteriorScoresCalculator.meta_info()
    return StatCalculatorContainer(
        name=PosteriorScoresCalculator.__name__,
        stats=stats,
        dependencies=needed,
        builder=__name__,
        cfg={"posterior": str(posterior)},
    )


def load_stat_calculator(config: Mapping[str, Any], builder: Any) -> PosteriorScoresCalculator:  # noqa: ARG001
    """What lm-polygraph calls for a calculator whose builder is this module; `config` has `posterior`, a file."""
    return PosteriorScoresCalculator(config["posterior"])


def load_estimator(config: Mapping[str, Any]) -> PosteriorScore:
    """What lm-polygraph calls for an estimator of this module's name; `config` has `score`, or nothing."""
    return PosteriorScore(**config)
