"""Files of predictions, a row for each question or example: JSON Lines and parquet."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

from bmoe_lightning.serving.predictions import SET_COLUMN
from bmoe_lightning.utils.atomic_io import replaced_file

PREDICTION_SUFFIXES = (".jsonl", ".parquet")
_ROWS_OF_A_GROUP = 10_000
# Columns of parquet that are not numbers.
_TEXTS, _NUMBERS = ("id", "prediction", "answer"), "probabilities"


def write_prediction_file(path: Path, lines: Callable[[], Iterator[str]]) -> None:
    """Write a file of predictions, under a temporary name first.

    Args:
        path: Path of the file, whose suffix is one of `PREDICTION_SUFFIXES`, in an existing folder.
        lines: Returns an iterator over the rows as lines of JSON; called twice for parquet.

    Raises:
        OSError: If it cannot be written.
    """
    with replaced_file(path) as temporary:
        if path.suffix == ".jsonl":
            with temporary.open("w", encoding="utf-8") as file:
                file.writelines(lines())
            return
        import pyarrow as pa
        from pyarrow.parquet import ParquetWriter

        # Not every row has every column: an answer may be known for some questions only.
        columns = dict.fromkeys(name for line in lines() for name in json.loads(line))
        types = {
            **dict.fromkeys(_TEXTS, pa.string()),
            _NUMBERS: pa.list_(pa.float64()),
            SET_COLUMN: pa.list_(pa.string()),
        }
        schema = pa.schema([(name, types.get(name, pa.float64())) for name in columns])
        remaining = lines()
        with ParquetWriter(temporary, schema) as writer:
            while group := [json.loads(line) for line in islice(remaining, _ROWS_OF_A_GROUP)]:
                writer.write_table(pa.Table.from_pylist(group, schema=schema))
