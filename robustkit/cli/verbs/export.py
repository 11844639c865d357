"""`robustkit export`: a run's verdicts as CSV or Parquet."""

from __future__ import annotations

from robustkit.api.options.runs import ExportFlags
from robustkit.cli.output import save
from robustkit.cli.streams import print_result
from robustkit.core.errors import UsageError
from robustkit.reporting.exports.verdicts import rows, to_csv, to_parquet
from robustkit.runs import run_folder


def export(flags: ExportFlags) -> int:
    """Run the verb; UsageError unless exactly one file is given."""
    folder, csv, parquet = flags.folder, flags.csv, flags.parquet
    if csv is not None and parquet is not None:
        raise UsageError("--csv and --parquet are both given; use one of them.")
    path = csv or parquet
    if path is None:
        raise UsageError("no file to write; give one with --csv FILE or --parquet FILE.")
    report = run_folder.read_report(folder)
    table = rows(report, run_folder.read_examples(folder, report))
    save(path, to_csv(table) if csv is not None else _parquet(table))
    print_result(f"{len(table):,} row{'s' * (len(table) != 1)}   {path}")
    return 0


def _parquet(table: list[dict[str, object]]) -> bytes:
    try:
        return to_parquet(table)
    except ImportError:
        raise UsageError(
            "Parquet needs pyarrow, which is not installed; pip install pyarrow, or use --csv FILE."
        ) from None
