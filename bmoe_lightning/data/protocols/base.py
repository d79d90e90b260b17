"""The base class of protocols: which questions train, which calibrate and which are reported, for each task."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from bmoe_lightning.data.tasks.base import SPLIT_NAMES, SplitName, Task


@dataclass(frozen=True)
class HeldOutShare:
    """A seeded share of the training split, on which nothing is trained; see `split_train`.

    Attributes:
        fraction: Share of the training questions, strictly between 0 and 1.

    Raises:
        ValueError: If it is not.
    """

    fraction: float

    def __post_init__(self) -> None:
        if not 0.0 < self.fraction < 1.0:
            raise ValueError(f"fraction is {self.fraction}; it must lie strictly between 0 and 1")

    def describe(self) -> str:
        """The part in words."""
        return f"{100 * self.fraction:g} % of train"


@dataclass(frozen=True)
class TrainingSample:
    """A seeded sample of the training questions, which are trained on too.

    Attributes:
        count: Number of questions, at least 1; all of them if there are fewer.

    Raises:
        ValueError: If it is below 1.
    """

    count: int

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"count is {self.count}; it must be at least 1")

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

    Raises:
        ValueError: If the split that is reported is trained or calibrated on, one split is for both of these,
            `otherwise` is given without a split, or there is no split of a name.
    """

    calibration: Calibration
    test: SplitName
    train: SplitName = "train"
    otherwise: HeldOutShare | None = None

    def __post_init__(self) -> None:
        named = [self.train, self.test, *([self.calibration] if isinstance(self.calibration, str) else [])]
        for name in named:
            if name not in SPLIT_NAMES:
                raise ValueError(f"unknown split {name!r}; choose from {', '.join(SPLIT_NAMES)}")
        if len(set(named)) != len(named):
            raise ValueError(
                f"one split has two purposes: train is {self.train!r}, calibration {self.calibration!r}, test "
                f"{self.test!r}; nothing may be tuned on what is reported, and questions that are trained on too are a "
                "TrainingSample"
            )
        if self.otherwise is not None and not isinstance(self.calibration, str):
            raise ValueError("otherwise replaces a calibration split that the data lack; calibration names none")

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
