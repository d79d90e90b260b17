"""Calibrated Mixture-of-Experts language models: a Laplace posterior on every expert, as a Lightning callback."""

from typing import TYPE_CHECKING, Any

from bmoe_lightning.utils.late_import import late_import

if TYPE_CHECKING:
    from bmoe_lightning.callback import BayesianMoECallback
    from bmoe_lightning.data import MultipleChoiceDataModule
    from bmoe_lightning.finetuner import ExpertFinetuner
    from bmoe_lightning.laplace import LaplacePosterior
    from bmoe_lightning.lora_finetuner import LoRAFinetuner
    from bmoe_lightning.prediction_writer import PredictionWriter
    from bmoe_lightning.router_callback import RouterTrainingCallback
    from bmoe_lightning.router_finetuner import RouterFinetuner
    from bmoe_lightning.serving import CalibratedModel
    from bmoe_lightning.text_callback import BayesianTextCallback

__version__ = "0.1.0"

__all__ = [
    "BayesianMoECallback",
    "BayesianTextCallback",
    "CalibratedModel",
    "ExpertFinetuner",
    "LaplacePosterior",
    "LoRAFinetuner",
    "MultipleChoiceDataModule",
    "PredictionWriter",
    "RouterFinetuner",
    "RouterTrainingCallback",
    "__version__",
]

_HOMES = {
    "BayesianMoECallback": "bmoe_lightning.callback",
    "BayesianTextCallback": "bmoe_lightning.text_callback",
    "CalibratedModel": "bmoe_lightning.serving",
    "ExpertFinetuner": "bmoe_lightning.finetuner",
    "LaplacePosterior": "bmoe_lightning.laplace",
    "LoRAFinetuner": "bmoe_lightning.lora_finetuner",
    "MultipleChoiceDataModule": "bmoe_lightning.data",
    "PredictionWriter": "bmoe_lightning.prediction_writer",
    "RouterFinetuner": "bmoe_lightning.router_finetuner",
    "RouterTrainingCallback": "bmoe_lightning.router_callback",
}


if not TYPE_CHECKING:  # a type checker that saw it would accept any name

    def __getattr__(name: str) -> Any:
        # Imported when first asked for: serving a posterior needs no Lightning, and a command's --help no torch.
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(late_import(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
