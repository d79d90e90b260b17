"""Context managers that load the weights of a trainer's best checkpoint."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch

from bmoe_lightning.utils.file_header import check_readable


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

    The file is loaded with `weights_only=True`: its path may come from another checkpoint, and unpickling could run
    arbitrary code.

    Args:
        trainer: The trainer, whose checkpoint callback knows the file.
        module: The module, on its device.

    Raises:
        RuntimeError: If the checkpoint callback has saved none, the file is damaged or contains objects that need
            unpickling, or its tensors have other shapes.
        OSError: If the file is missing or cannot be read.
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
        raise RuntimeError(f"the checkpoint callback names {path!r:.80} as its best checkpoint; use fit_at='last'")
    check_readable(Path(path), "best checkpoint")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        damaged = not zipfile.is_zipfile(path)
        classes = [] if damaged else torch.serialization.get_unsafe_globals_in_checkpoint(path)
        if not classes:
            raise _damaged(path) from error
        raise RuntimeError(
            f"the best checkpoint {path} contains objects of {', '.join(sorted(classes)[:3])}, and unpickling objects "
            "other than tensors and plain values can run code. Exclude them from the checkpoint "
            "(save_hyperparameters(ignore=[...]), plain values in state_dict and on_save_checkpoint), allow trusted "
            "classes with torch.serialization.add_safe_globals, or use fit_at='last'."
        ) from error
    except (RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise _damaged(path) from error
    state = checkpoint.get("state_dict") if isinstance(checkpoint, Mapping) else None
    if not isinstance(state, Mapping):
        raise _damaged(path)
    return dict(state)


def _damaged(path: str) -> RuntimeError:
    return RuntimeError(f"the best checkpoint {path} is damaged, or no checkpoint of Lightning; use fit_at='last'")
