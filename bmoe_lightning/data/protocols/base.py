"""The base class of protocols: which questions train, which calibrate and which are reported, for each task."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from bmoe_lightning.data.tasks.base import SplitName, Task


@dataclass(frozen=True)
class HeldOutShare:
    """A seeded share of the training split, on which nothing is trained; see `split_train`.

    Attributes:
        fraction: Share of the training questions, strictly between 0 and 1.
    """

    fraction: float

    def describe(self) -> str:
        """The part in words."""
        return f"{100 * self.fraction:g} % of train"


@dataclass(frozen=True)
class TrainingSample:
    """A seeded sample of the training questions, which are trained on too.

    Attributes:
        count: Number of questions; all of them if there are fewer.
    """

    count: int

    def describe(self) -> str:
        """The part in words."""
        return f"up to {self.count} of train, trained on too"


@dataclass(frozen=True)
class Remainder:
    """The training questions of a larger configuration that a smaller one does not have, where they are nested.

    Attributes:
        config: Larger configuration of the data set.
        without: Smaller configuration.
    """

    config: str
    without: str

    def describe(self) -> str:
        """The part in words."""
        return f"train of {self.config} that is not in {self.without}"


Calibration = SplitName | HeldOutShare | TrainingSample | Remainder


@dataclass(frozen=True)
class Parts:
    """What each part of an experiment is made of; splits by the names that a task maps to those of its data.

    Attributes:
        calibration: Questions that prior precisions, temperatures and other hyper-parameters are tuned on.
        test: Split that is reported.
        train: Split that is trained on.
        otherwise: Calibration questions of data without the split `calibration`; None where the data have to have it.
    """

    calibration: Calibration
    test: SplitName
    train: SplitName = "train"
    otherwise: HeldOutShare | None = None

    def describe_calibration(self) -> str:
        """The calibration part in words."""
        found = self.calibration if isinstance(self.calibration, str) else self.calibration.describe()
        return found if self.otherwise is None else f"{found}, or else {self.otherwise.describe()}"


@dataclass(frozen=True)
class Protocol(ABC):
    """How an evaluation uses the splits of each task: a frozen dataclass whose fields have defaults, and `parts`.

    Whatever the protocol, a question that is also asked in the calibration or test part is not trained on, and one of
    the test part does not calibrate; see `bmoe_lightning.data.duplicates`.

    Attributes:
        name: Name in the registry; lower-case letters, digits and underscores.
        label: Display name.
        url: Where the protocol is described; empty if it is this library's.
        seed: Seed of whatever is drawn. The splits depend on it alone, not on the seed of a training run.
    """

    name: str
    label: str
    url: str = ""
    seed: int = 0

    @abstractmethod
    def parts(self, task: Task) -> Parts:
        """The parts of a task.

        Args:
            task: Task of the data.
        """


def labelled_validation(task: Task) -> SplitName:
    """The split that holds the data set's own validation questions.

    The hidden answers of a test split make some tasks report their validation split: for them it is `test`.

    Args:
        task: Any task.
    """
    return "validation" if task.validation_splits else "test"
