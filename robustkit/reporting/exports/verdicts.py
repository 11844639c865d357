"""Export a run's verdicts as a table with one row per image, for a spreadsheet or a data frame."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from typing import Any

import numpy as np

from robustkit.core.errors import printable
from robustkit.runs.evaluation_record import Report

COLUMNS = (
    "index",
    "label",
    "clean_prediction",
    "robust",
    "attack",
    "margin",
    "adversarial_prediction",
    "distance",
)
SMALLEST = "smallest_distance"
# Characters that a spreadsheet begins a formula with, or skips before one.
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "\n")


def rows(report: Report, examples: Mapping[str, np.ndarray] | None) -> list[dict[str, Any]]:
    """Return a row per image; prediction and distance are None except for fooled images of a run with examples.

    A run with a curve or for minimum norms has one more column, SMALLEST: the smallest distance at which the
    model was fooled, which may be beyond eps; 0 if the clean image is misclassified, None if it was never fooled.
    """
    found: dict[int, tuple[int, float]] = {}
    if examples is not None:
        columns = (examples[name].tolist() for name in ("index", "prediction", "distance"))
        found = {index: (prediction, distance) for index, prediction, distance in zip(*columns, strict=True)}
    nothing = (None, None)
    table: list[dict[str, Any]] = [
        dict(
            zip(
                COLUMNS,
                (
                    verdict.index,
                    verdict.label,
                    verdict.clean_prediction,
                    verdict.robust,
                    verdict.attack,
                    verdict.margin,
                    *found.get(verdict.index, nothing),
                ),
                strict=True,
            )
        )
        for verdict in report.verdicts
    ]
    if found_by := report.curve or report.minimum:
        for row, smallest in zip(table, found_by.distances, strict=True):
            row[SMALLEST] = smallest
    return table


def to_csv(table: list[dict[str, Any]]) -> bytes:
    """Return the rows as CSV: `true` and `false`, an empty cell for None, numbers with all digits.

    Text that a spreadsheet would read as a formula gets a leading apostrophe; control characters are escaped.
    """
    file = io.StringIO(newline="")
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(table[0])
    for row in table:
        writer.writerow([_cell(value) for value in row.values()])
    return file.getvalue().encode()


def _cell(value: Any) -> Any:
    if isinstance(value, bool):
        return str(value).lower()
    if not isinstance(value, str):
        return value
    # csv quotes its own line terminator only; a carriage return would end the row, so it is escaped.
    return "'" * value.startswith(FORMULA_STARTS) + printable(value)


def to_parquet(table: list[dict[str, Any]]) -> bytes:
    """Return the rows as a Parquet file; ImportError without pyarrow."""
    import pyarrow
    from pyarrow import parquet

    whole, number = pyarrow.int64(), pyarrow.float64()
    types = (whole, whole, whole, pyarrow.bool_(), pyarrow.string(), number, whole, number)
    columns = [*zip(COLUMNS, types, strict=True), (SMALLEST, number)]
    schema = pyarrow.schema([(name, kind) for name, kind in columns if name in table[0]])
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.Table.from_pylist(table, schema=schema), sink)
    return bytes(sink.getvalue().to_pybytes())
