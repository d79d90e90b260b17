"""What tasks share whose rows have a subject: questions of named subjects alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from bmoe_lightning.data.tasks.base import NumberedRow, Task
from bmoe_lightning.utils.messages import described


@dataclass(frozen=True)
class SubjectTask(Task):
    """A task whose rows name their subject, or leave it empty.

    Attributes:
        subjects: Subjects to read, such as `("high_school_physics", "astronomy")`; empty for every subject. Rows whose
            subject is empty are always read.

    Raises:
        TypeError: If `subjects` is one string.
    """

    subjects: tuple[str, ...] = ()

    subject_column: ClassVar[str] = "subject"

    def __post_init__(self) -> None:
        given: object = self.subjects
        # One string is a sequence too, of one subject a character.
        if isinstance(given, str):
            raise TypeError(f"subjects must be a tuple of names, found {given!r}; write ({given!r},)")
        object.__setattr__(self, "subjects", tuple(self.subjects))

    def select(self, rows: Iterator[NumberedRow]) -> Iterator[NumberedRow]:
        """The rows of `subjects`; `Task.select` describes the arguments.

        Raises:
            ValueError: If a row has no subject, or one of `subjects` is not in the data.
        """
        if not self.subjects:
            yield from rows
            return
        found: set[str] = set()
        for where, row in rows:
            subject = row.get(self.subject_column)
            if not isinstance(subject, str):
                raise ValueError(f"{where}: {self.subject_column} must be a text, found {described(subject)}")
            found.add(subject)
            if subject in ("", *self.subjects):
                yield where, row
        named = found - {""}
        absent = [subject for subject in self.subjects if subject not in named]
        if absent and named:
            raise ValueError(f"no row has the subject {absent[0]!r}; the subjects are {', '.join(sorted(named))}")
