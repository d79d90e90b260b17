"""The protocol of BLoB (Wang et al. 2024, https://arxiv.org/abs/2406.11675) and TFB (https://arxiv.org/abs/2412.05723)."""

from __future__ import annotations

from dataclasses import dataclass

from bmoe_lightning.data.protocols.base import Parts, Protocol, TrainingSample, labelled_validation
from bmoe_lightning.data.tasks.base import Task


@dataclass(frozen=True)
class BLoB(Protocol):
    """All of train is trained on, the public validation split is reported, and a sample of train calibrates.

    C-LoRA and IVON-LoRA evaluate likewise. The sample, TFB's anchors, is trained on too: what is tuned on it sees
    predictions that are better than those on new questions, and temperatures come out too small.

    Attributes:
        anchors: Number of questions of the sample.
    """

    name: str = "blob"
    label: str = "BLoB and TFB"
    url: str = "https://arxiv.org/abs/2412.05723"
    anchors: int = 500

    def parts(self, task: Task) -> Parts:
        """The parts of a task; `Protocol.parts` describes the arguments."""
        return Parts(TrainingSample(self.anchors), labelled_validation(task))
