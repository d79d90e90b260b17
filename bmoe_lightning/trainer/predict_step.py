"""What `trainer.predict` returns with the callbacks: a module's `predict_step`, patched to predict with a method."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import lightning as L
from torch import Tensor, nn

from bmoe_lightning.experts import ClassLogits
from bmoe_lightning.experts.fsdp import runs_in_lockstep
from bmoe_lightning.laplace.predictive import entropy
from bmoe_lightning.methods.evaluation import Predictor
from bmoe_lightning.trainer.signals import check_sigterm
from bmoe_lightning.utils.distributed import failing_together

_LABELS = "_labels_of_batch"  # attribute of a patched step


def predicted(predictor: Predictor, module: nn.Module, class_logits: ClassLogits, batch: Any) -> dict[str, Any]:
    """The output of `trainer.predict` for a batch.

    Args:
        predictor: Predictor of one method.
        module: The model.
        class_logits: Function `(module, batch) -> (logits [B, K], labels [B] or None)`.
        batch: Batch that `class_logits` accepts.

    Returns:
        `method` (its name), `probs` and `log_probs` `[B, K]`, `logits` `[B, K]` of the model itself, and `entropy`
        `[B]` of `probs` in nats; the method's scores of uncertainty `[B]` by name, see `Method.uncertainty`; and, of
        methods with a posterior, `logit_covariance` `[B, K, K]` of the centred logits; and `labels` `[B]` where known.
    """
    with failing_together(distributed=runs_in_lockstep(module)):
        log_probs, view = predictor.predict(module, class_logits, batch)
        found: dict[str, Any] = {
            **predictor.uncertainty(view),
            "method": predictor.method.name,
            "probs": log_probs.exp(),
            "log_probs": log_probs,
            "logits": view.logits,
            "entropy": entropy(log_probs),
        }
        gaussian = predictor.covariance(view)
        if gaussian is not None:
            found["logit_covariance"] = gaussian[1]
        if view.labels is not None:
            found["labels"] = view.labels
        return found


def replace_predict_step(
    trainer: L.Trainer, module: L.LightningModule, predicted: Callable[[Any], dict[str, Any]]
) -> Callable[[], None]:
    """Patch a module's `predict_step` to return a prediction beside its original output.

    If the original output is a mapping, its entries (an `index`, say) are merged, and those of `predicted` take
    precedence, except for `labels`; any other output becomes the entry `step_output`. The batch's `index`, if it has
    one, is added. SIGTERM stops the trainer before the next batch, which its loop of predictions does not do.

    Args:
        trainer: Trainer that predicts.
        module: The module.
        predicted: Prediction of a batch, such as `predicted` with all but that given.

    Returns:
        A function that takes the replacement out again.

    Raises:
        ValueError: If another callback has patched the step already.
    """
    before = vars(module).get("predict_step")
    if hasattr(before, _LABELS):
        raise ValueError(
            "two callbacks have a predict_method, and only one prediction can be returned; set one of them to None"
        )
    step = module.predict_step
    has_step = before is not None or type(module).predict_step is not L.LightningModule.predict_step

    def predict_step(batch: Any, *args: Any) -> dict[str, Any]:
        check_sigterm(trainer)
        output = step(batch, *args) if has_step else None
        found = predicted(batch)
        setattr(predict_step, _LABELS, found.get("labels"))
        known = {"index": batch["index"]} if isinstance(batch, Mapping) and "index" in batch else {}
        known |= {name: found.pop(name) for name in ("labels",) if name in found}
        if isinstance(output, Mapping):
            return {**known, **output, **found}
        return {**known, **found} if output is None else {**known, **found, "step_output": output}

    def restore() -> None:
        if before is None:
            del module.predict_step
        else:
            module.predict_step = before  # type: ignore[method-assign]

    setattr(predict_step, _LABELS, None)
    # On the instance, so that the class stays as it is.
    module.predict_step = predict_step  # type: ignore[method-assign]
    return restore


def predicted_labels(module: L.LightningModule) -> Tensor | None:
    """The labels `[B]` that `class_logits` gave for the last batch of a patched `predict_step`; None where unknown.

    The output of the step may have others: its `labels` are those of the module's `predict_step`, if that has any.

    Args:
        module: The module.
    """
    found: Tensor | None = getattr(vars(module).get("predict_step"), _LABELS, None)
    return found
