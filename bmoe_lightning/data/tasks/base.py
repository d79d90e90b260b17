"""The base class of tasks: a public data set, and the conversion of its rows to questions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from bmoe_lightning.data.questions import Question
from bmoe_lightning.utils.messages import shown

Row = Mapping[str, Any]
NumberedRow = tuple[str, Row]
"""The location of a row, for error messages, and its columns."""
SplitName = Literal["train", "validation", "test"]
SPLIT_NAMES: tuple[SplitName, ...] = ("train", "validation", "test")


@dataclass(frozen=True)
class Task(ABC):
    """A multiple-choice data set: a frozen dataclass whose fields have defaults, and `question`.

    A split may have any one of its names; data with two of them are refused. The names are those of the hub, and those
    of the files in a local folder.

    Attributes:
        name: Name in the registry; lower-case letters, digits and underscores.
        label: Display name.
        url: URL of the data set card.
        columns: Columns by which rows of this task are recognised if no task is named.
        hub_id: Id on the hub, `owner/name`; empty if it is not there.
        default_config: Configuration that is loaded by default; None for the hub's default.
        configs: Configurations of which the user must name one, if there is no sensible default.
        train_splits: Names of the training split.
        validation_splits: Names of the validation split, on which prior precisions and temperatures are tuned; empty
            if the data set has none, so that a part of train is set aside.
        test_splits: Names of the split that is reported; its answers have to be public.
    """

    name: str
    label: str
    url: str
    columns: tuple[str, ...]
    hub_id: str = ""
    default_config: str | None = None
    configs: tuple[str, ...] = ()
    train_splits: tuple[str, ...] = ("train",)
    # The hub says validation, original archives dev.
    validation_splits: tuple[str, ...] = ("validation", "valid", "val", "dev")
    test_splits: tuple[str, ...] = ("test",)

    @abstractmethod
    def question(self, row: Row, row_id: str) -> Question:
        """Turn one row into a question. `bmoe_lightning.data.tasks.columns` reads and checks single columns.

        Args:
            row: Columns by name; a task reads those that it needs.
            row_id: Split and number of the row, such as `test-17`: the id of a question whose row has none.

        Raises:
            ValueError: If the row is malformed; the message names the column and the defect.
            TypeError: If the row is malformed, likewise.
            KeyError: If a column is missing.
        """

    def select(self, rows: Iterator[NumberedRow]) -> Iterator[NumberedRow]:
        """The rows of a split that this task reads; all of them unless a task has options that choose.

        Args:
            rows: All rows of the split, each with its location.

        Raises:
            ValueError: If the rows that are chosen do not exist.
        """
        return rows

    def read(self, row: Row, row_id: str, where: str) -> Question:
        """Turn one row into a question; errors name the location of a malformed row.

        Args:
            row: Columns by name.
            row_id: As in `question`.
            where: Location: file and line, or data set and row; every message begins with it.

        Raises:
            ValueError: If the row is malformed.
        """
        try:
            return self.question(row, row_id)
        except KeyError as error:
            raise ValueError(f"{where}: {error.args[0]} missing; the columns found are {shown(sorted(row))}") from None
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where}: {error}") from None

    def split_names(self, split: SplitName) -> tuple[str, ...]:
        """The names under which the data may have a split.

        Args:
            split: Split to look up.
        """
        return {"train": self.train_splits, "validation": self.validation_splits, "test": self.test_splits}[split]
