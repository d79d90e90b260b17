"""Context managers that load the weights of a trainer's best checkpoint."""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch

from bmoe_lightning.trainer.router_checkpoints import stored_routers
from bmoe_lightning.utils.checkpoint_io import STATE_DICT, check_safe, read_checkpoint

_REMEDY = "use fit_at='last'"


def weights_to_fit(
    trainer: L.Trainer, module: L.LightningModule, fit_at: Literal["last", "best"]
) -> AbstractContextManager[None]:
    """Context manager in which the module has the weights that methods are fitted to; see `best_weights`.

    Args:
        trainer: The trainer.
        module: The module, with its last weights.
        fit_at: Weights to fit to: `best`, or `last`, which changes nothing.
    """
    return best_weights(trainer, module) if fit_at == "best" else nullcontext()


@contextmanager
def best_weights(trainer: L.Trainer, module: L.LightningModule) -> Iterator[None]:
    """Load the weights of the best checkpoint into the module within a context; the last ones are restored afterwards.

    Args:
        trainer: The trainer, whose checkpoint callback knows the file.
        module: The module, on its device.

    Raises:
        RuntimeError: If the checkpoint callback has saved none, or its tensors have other shapes.
        TypeError: If the checkpoint callback names something that is no path.
        OSError, ValueError: If the file cannot be used; see `read_checkpoint`.
    """
    path = getattr(trainer.checkpoint_callback, "best_model_path", "")
    if not path:
        raise RuntimeError(
            "fit_at='best', but the checkpoint callback has saved no checkpoint; let it save one, or use fit_at='last'"
        )
    best = _state_dict(path)
    current = {name: value for name, value in module.state_dict().items() if name in best}
    last = {name: value.detach().to("cpu", copy=True) for name, value in current.items()}
    try:
        # Inside the try block: a checkpoint with other shapes raises after it was partly loaded.
        module.load_state_dict(best, strict=False)
        yield
    finally:
        module.load_state_dict(last, strict=False)


def _state_dict(path: str) -> dict[str, Any]:
    if not isinstance(path, str):
        raise TypeError(f"the checkpoint callback names {path!r:.80} as its best checkpoint; {_REMEDY}")
    checkpoint = read_checkpoint(Path(path), "best checkpoint", remedy=_REMEDY)
    return {**checkpoint[STATE_DICT], **stored_routers(checkpoint)}


def check_hyperparameters(trainer: L.Trainer, module: L.LightningModule) -> None:
    """Check that checkpoints with the hyperparameters of module and DataModule need no unpickling of objects.

    Raises:
        UnsafeCheckpointError: If they contain objects that need it; the message names their classes.
    """
    given: tuple[Any, ...] = (module, getattr(trainer, "datamodule", None))
    owners = [owner for owner in given if getattr(owner, "hparams", None)]
    content = io.BytesIO()
    try:
        with torch.serialization.skip_data():  # a model among them may be large
            torch.save([dict(owner.hparams) for owner in owners], content)
    except (pickle.PicklingError, AttributeError, TypeError, RuntimeError):
        return  # Lightning cannot write such a checkpoint either, and says so
    content.seek(0)
    names = " and ".join(type(owner).__name__ for owner in owners)
    check_safe(
        content, f"the checkpoints of this run would contain hyperparameters of {names} that are", remedy=_REMEDY
    )


def check_best_so_far(trainer: L.Trainer) -> None:
    """Check that the best checkpoint so far, if there is one, can be loaded without unpickling objects.

    Raises:
        UnsafeCheckpointError: If it contains objects that need it; the message names their classes.
    """
    path = getattr(trainer.checkpoint_callback, "best_model_path", "")
    if isinstance(path, str) and path:
        check_safe(Path(path), f"the best checkpoint {path} contains", remedy=_REMEDY)
