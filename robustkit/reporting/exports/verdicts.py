"""A run's verdicts as a table of one row each, for a spreadsheet or a data frame."""

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
# What a spreadsheet begins a formula with, or skips in front of one.
FORMULAS = ("=", "+", "-", "@", "\t", "\r", "\n")


def rows(report: Report, examples: Mapping[str, np.ndarray] | None) -> list[dict[str, Any]]:
    """Return a row per image; prediction and distance are None but for fooled images of a run with examples.

    A run with a curve or for minimum norms has a column more, SMALLEST: the smallest distance that fooled the
    model, which may lie beyond eps; 0 for images that are wrong as they are, None where nothing fooled it.
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
    """Return the rows as CSV: true and false for booleans, nothing for None, numbers in full.

    A text that a spreadsheet would take for a formula gets an apostrophe in front; control characters are escaped.
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
    # A carriage return would end the row: csv quotes only what ends rows of its own.
    return "'" * value.startswith(FORMULAS) + printable(value)


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
