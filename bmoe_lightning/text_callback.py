"""The Lightning callback for modules that write text: a posterior, and the variance of `log p(y | x)` of each text."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import lightning as L
from torch import Tensor

from bmoe_lightning.callback import BayesianMoECallback
from bmoe_lightning.curvature.spec import Curvature
from bmoe_lightning.curvature.texts import text_class_logits
from bmoe_lightning.laplace.posterior import LaplacePosterior
from bmoe_lightning.methods.base import PRIOR_PRECISION, Method
from bmoe_lightning.methods.registry import get_method, method_names
from bmoe_lightning.trainer.checks import check_prediction
from bmoe_lightning.trainer.data_passes import as_list
from bmoe_lightning.trainer.first_batches import no_logging
from bmoe_lightning.trainer.predict_step import replace_predict_step


class BayesianTextCallback(BayesianMoECallback):
    """Fit a Laplace posterior over the experts when training ends; `trainer.predict` then scores texts with it.

    For modules that have `sequence_log_prob(batch) -> log p(y | x) [B]`, with graph, and no `class_logits`. The
    curvature is the empirical Fisher of the training texts. Everything else, files, resumption and several devices, is
    as in `BayesianMoECallback`; `posterior.safetensors` serves by itself, with `LaplacePosterior.sequence_variance`.
    Validation and test log nothing of it: metrics of classes have no meaning for texts.

    The output of `trainer.predict` has `log_prob`, `variance` and `isotropic` `[B]` of each batch (see
    `SequenceVariance`) beside what the module's `predict_step` returned.

    Examples:
        >>> trainer = L.Trainer(callbacks=[BayesianTextCallback()])   # doctest: +SKIP
        >>> trainer.fit(module, datamodule=data)                      # doctest: +SKIP
        >>> trainer.predict(module, datamodule=data)                  # doctest: +SKIP

    Args:
        method: Method that finds the prior precision: registered name, `package.module:Class`, or an instance. It must
            do so without probabilities of classes; by default the registered one that does.
        curvature: Curvature of the posterior; its labels are those of the texts (`fisher="empirical"`).
        fit_at: As in `BayesianMoECallback`.
        curvature_checkpoint_every: As there.
        dirpath: As there.
        name: As there.
        seed: As there.

    Raises:
        ValueError: If the method needs probabilities of classes, or the curvature has other labels.
    """

    def __init__(
        self,
        method: str | Method | None = None,
        curvature: Curvature | None = None,
        fit_at: Literal["last", "best"] = "last",
        curvature_checkpoint_every: int | None = None,
        dirpath: str | None = None,
        name: str = "",
        seed: int = 0,
    ) -> None:
        spec = Curvature(fisher="empirical") if curvature is None else curvature
        chosen = get_method(text_methods()[0] if method is None else method).with_defaults(spec)
        _check_method(chosen)
        super().__init__(
            (chosen,),
            spec,
            text_class_logits(_sequence_log_prob),
            fit_at,
            chosen.name,
            curvature_checkpoint_every,
            dirpath,
            name,
            seed,
        )

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Check the module too; see `BayesianMoECallback.setup`."""
        if not callable(getattr(pl_module, "sequence_log_prob", None)):
            raise TypeError(
                f"{type(pl_module).__name__} has no method sequence_log_prob(batch) -> log p(y | x) [B], which "
                "BayesianTextCallback needs; define it, or use BayesianMoECallback for a module with class_logits"
            )
        super().setup(trainer, pl_module, stage)

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Patch the module's `predict_step` to return mean and variance of `log p(y | x)` as well."""
        check_prediction(trainer, as_list(trainer.predict_dataloaders))
        fitted = self._ready(trainer, pl_module)
        (method,) = self.methods
        (curvature,) = method.curvatures
        posterior = fitted.posteriors[curvature.digest].with_prior_precision(fitted.state_of(method)[PRIOR_PRECISION])
        self._undo.append(replace_predict_step(trainer, pl_module, partial(self._scored, pl_module, posterior)))

    def _scored(self, module: L.LightningModule, posterior: LaplacePosterior, batch: Any) -> dict[str, Any]:
        return vars(posterior.sequence_variance(module, self._log_prob, batch)).copy()

    def _log_prob(self, model: Any, batch: Any) -> Tensor:
        with self._precision(), no_logging(model):
            return _sequence_log_prob(model, batch)

    def _begin(self, trainer: L.Trainer, module: L.LightningModule, stage: str, loop: Any) -> None:
        """Nothing is evaluated: metrics are of classes."""


def text_methods() -> tuple[str, ...]:
    """Names of the registered methods that find a prior precision for texts, without probabilities of classes."""
    return tuple(name for name in method_names() if _is_for_texts(get_method(name)))


def _is_for_texts(method: Method) -> bool:
    needs = method.needs
    is_posterior = PRIOR_PRECISION in method.positive_state and len(method.curvatures) <= 1 and not method.is_ensemble
    return is_posterior and not (needs.calibration or needs.training_labels or needs.lora or needs.snapshots)


def _check_method(method: Method) -> None:
    if not _is_for_texts(method):
        raise ValueError(
            f"{method.name} needs probabilities of classes, which texts do not have; methods that find a prior "
            f"precision without them are {', '.join(text_methods())}"
        )
    for curvature in method.curvatures:
        if curvature.collects and curvature.fisher != "empirical":
            raise ValueError(
                f"{method.name} has fisher={curvature.fisher!r}, which needs probabilities of classes; "
                "the labels of texts are the texts themselves: Curvature(fisher='empirical')"
            )


def _sequence_log_prob(module: Any, batch: Any) -> Tensor:
    found: Tensor = module.sequence_log_prob(batch)
    return found
