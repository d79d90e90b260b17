"""Temperature scaling: logits divided by one temperature that is fitted on held-out labels."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from bmoe_lightning.methods.base import Method, State, scalar
from bmoe_lightning.methods.batch_view import BatchView
from bmoe_lightning.methods.needs import Needs
from bmoe_lightning.methods.temperature_search import fit_temperature
from bmoe_lightning.methods.workbench import Workbench


@dataclass(frozen=True)
class TemperatureScaling(Method):
    """`softmax(f / T)` with T fitted on held-out labels: the accuracy is unchanged, the confidence is not.

    Guo, Pleiss, Sun and Weinberger 2017, On Calibration of Modern Neural Networks.
    """

    name: str = "temperature"
    label: str = "Temperature scaling"

    positive_state = ("temperature",)
    source = "https://arxiv.org/abs/1706.04599"

    @property
    def needs(self) -> Needs:
        return Needs(calibration_labels=True, advised_labels=25)

    def fit(self, work: Workbench) -> State:
        return {"temperature": scalar(fit_temperature(*work.labelled_logits()))}

    def log_probs(self, batch: BatchView, state: State) -> Tensor:
        return (batch.logits / state["temperature"].to(batch.logits)).log_softmax(-1)

    def refit(self, state: State, logits: Tensor, labels: Tensor) -> State:
        return {"temperature": scalar(fit_temperature(logits, labels) if len(labels) else 1.0)}
