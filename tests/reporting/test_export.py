"""Export: every verdict is a row, and rows read back as the same verdicts."""

from __future__ import annotations

import csv
import io

import pytest
from reports import make_examples, make_report

from robustkit.reporting.exports.verdicts import COLUMNS, rows, to_csv, to_parquet


@pytest.mark.parametrize("with_examples", [True, False])
def test_csv_round_trips(with_examples: bool) -> None:
    report = make_report(attacks=('a,"b"', "pgd"))
    examples = make_examples(report) if with_examples else None
    read = list(csv.DictReader(io.StringIO(to_csv(rows(report, examples)).decode(), newline="")))
    assert tuple(read[0]) == COLUMNS
    assert len(read) == report.n
    distances = dict(zip(examples["index"], examples["distance"], strict=True)) if examples else {}
    for row, verdict in zip(read, report.verdicts, strict=True):
        assert int(row["index"]) == verdict.index
        assert int(row["label"]) == verdict.label
        assert int(row["clean_prediction"]) == verdict.clean_prediction
        assert row["robust"] == str(verdict.robust).lower()
        assert row["attack"] == (verdict.attack or "")
        assert float(row["margin"]) == verdict.margin
        distance = distances.get(verdict.index)
        assert (float(row["distance"]) if row["distance"] else None) == distance
        assert (row["adversarial_prediction"] == "") == (distance is None)


def test_parquet_round_trips() -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    report = make_report()
    table = rows(report, make_examples(report))
    assert parquet.read_table(io.BytesIO(to_parquet(table))).to_pylist() == table
