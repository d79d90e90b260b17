"""Methods that turn a model into class probabilities, one file per method."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bmoe_lightning.methods.registry import get_method, method_names, register_method
from bmoe_lightning.utils.late_import import late_import

if TYPE_CHECKING:
    from bmoe_lightning.methods.base import CurvatureMethod, Method, State
    from bmoe_lightning.methods.batch_view import BatchView
    from bmoe_lightning.methods.data_differences import DataMismatchError
    from bmoe_lightning.methods.evaluation import Predictions, average_log_probs, evaluate
    from bmoe_lightning.methods.fit_result import FitResult, NotFittedError
    from bmoe_lightning.methods.fitting import fit_methods
    from bmoe_lightning.methods.needs import Available, Needs, NeedsError, check_needs
    from bmoe_lightning.methods.options import option
    from bmoe_lightning.methods.snapshots import apply_snapshot, read_snapshot, save_snapshot, swapped_weights
    from bmoe_lightning.methods.workbench import Workbench

__all__ = [
    "Available",
    "BatchView",
    "CurvatureMethod",
    "DataMismatchError",
    "FitResult",
    "Method",
    "Needs",
    "NeedsError",
    "NotFittedError",
    "Predictions",
    "State",
    "Workbench",
    "apply_snapshot",
    "average_log_probs",
    "check_needs",
    "evaluate",
    "fit_methods",
    "get_method",
    "method_names",
    "option",
    "read_snapshot",
    "register_method",
    "save_snapshot",
    "swapped_weights",
]

_MODULES = {
    "base": ("CurvatureMethod", "Method", "State"),
    "options": ("option",),
    "needs": ("Available", "Needs", "NeedsError", "check_needs"),
    "batch_view": ("BatchView",),
    "evaluation": ("Predictions", "average_log_probs", "evaluate"),
    "fit_result": ("FitResult", "NotFittedError"),
    "snapshots": ("apply_snapshot", "read_snapshot", "save_snapshot", "swapped_weights"),
    "fitting": ("fit_methods",),
    "data_differences": ("DataMismatchError",),
    "workbench": ("Workbench",),
}


def __getattr__(name: str) -> Any:
    # Imported lazily, so that the names of all methods are known without torch.
    for module, names in _MODULES.items():
        if name in names:
            return getattr(late_import(f"{__name__}.{module}"), name)
    from bmoe_lightning.methods.registry import built_in_class

    return built_in_class(name)


def __dir__() -> list[str]:
    from bmoe_lightning.methods.registry import built_in_class_names

    return sorted({*__all__, *built_in_class_names()})
