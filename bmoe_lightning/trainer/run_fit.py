"""The fit of a run's methods within a trainer, and what is checked before one without training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import lightning as L
from torch import Tensor

from bmoe_lightning.experts import ClassLogits
from bmoe_lightning.methods.base import Method
from bmoe_lightning.methods.fit_result import FitResult
from bmoe_lightning.methods.fitting import fit_methods
from bmoe_lightning.methods.needs import Available, check_needs
from bmoe_lightning.trainer.checks import check_data, check_runs, optimised
from bmoe_lightning.trainer.data_passes import TrainerTrainingData, validation_pass
from bmoe_lightning.trainer.first_batches import FirstBatches
from bmoe_lightning.trainer.progress import print_line
from bmoe_lightning.trainer.run_folder import RunFolder


def check_completion(
    trainer: L.Trainer,
    module: L.LightningModule,
    methods: Sequence[Method],
    class_logits: ClassLogits,
    folder: RunFolder,
    *,
    is_new: bool,
) -> None:
    """Check that methods can be fitted without training. A collective.

    Args:
        trainer: Trainer within a fit, with its training loader set up.
        module: The module.
        methods: Methods that are not fitted yet.
        class_logits: Function `(module, batch) -> (logits [B, K], labels [B])`.
        folder: Folder of the run, with the snapshots for the module's weights.
        is_new: Whether there is no fit to these weights yet; otherwise few or no batches are needed, and none is tried.

    Raises:
        NeedsError: If there are too few snapshots or no held-out inputs.
        ValueError: If data, labels or a method's own requirements do not allow it.
    """
    check_needs(methods, Available(snapshots=len(folder.snapshots)))
    check_data(trainer, methods, trains=False)
    check_runs(trainer, methods, module, folder.folder)
    if is_new:
        FirstBatches(methods, class_logits).check_fit(trainer, module, trains=False)


def fit_run(
    trainer: L.Trainer,
    module: L.LightningModule,
    methods: Sequence[Method],
    class_logits: ClassLogits,
    folder: RunFolder,
    *,
    prior_mean: Mapping[str, Tensor] | None,
    earlier: FitResult | None,
    seed: int,
) -> FitResult:
    """Fit methods to a module with the data of its trainer. A collective.

    Args:
        trainer: Trainer within a fit.
        module: The module, with the weights that are fitted.
        methods: Methods; those that `earlier` has are not fitted again.
        class_logits: Function `(module, batch) -> (logits [B, K], labels [B])`, checked on first batches for a new fit.
        folder: Folder of the run, which has begun.
        prior_mean: Weights from before fine-tuning, if methods use them; see `fit_methods`.
        earlier: Fit to the same weights that is completed, or None.
        seed: Seed for sampled labels, sketch matrices and Monte Carlo noise.

    Raises:
        ValueError: See `fit_methods`.
        OSError: If a checkpoint of a curvature pass cannot be written.
    """
    needs_calibration = any(method.needs.calibration for method in methods)
    return fit_methods(
        methods,
        module,
        class_logits,
        TrainerTrainingData(trainer),
        validation_pass(trainer, "Calibration") if needs_calibration else None,
        prior_mean=prior_mean,
        snapshots=folder.snapshots,
        earlier=earlier,
        trained=optimised(trainer, module),
        seed=seed,
        distributed=trainer.world_size > 1,
        pass_files=folder.pass_files(),
        fit_id=folder.fit_id,
        is_checked=earlier is None,
        tell=partial(print_line, trainer),
    )
