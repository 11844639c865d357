"""Precision and recall of the warnings that `auto` raises, from rows that scripts/benchmarks/gauntlet.py recorded.

    python scripts/benchmarks/flags.py ROWS.jsonl ... [RUN ...]

RUN is the folder of an evaluation of an unmasked net, as scripts/benchmarks/strictness.py leaves them.

A mask misleads AutoAttack where AutoAttack's number exceeds the truth by more than 2 points and more than 1 image.
A miss is such a mask without a flag. Recall is the share of these masks that have one, precision the share of the
flagged rows that are masks. The last column counts masks where `auto` itself exceeds the truth without a flag.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
WARNS = ("warning", "error")


def read(path: Path) -> list[Row]:
    """Return the rows in a file of the gauntlet, or the one of an unmasked net's run folder."""
    if not path.is_dir():
        return [json.loads(line) for line in path.read_text().splitlines()]
    report = json.loads((path / "report.json").read_text())
    flags = sorted(flag["code"] for flag in report["flags"] if flag["level"] in WARNS)
    return [{"name": f"unmasked: {path.name}", "net": "", "threat": report["spec"]["threat"], "flags": flags}]


def exceeds(row: Row, suite: str) -> bool:
    """Return whether a suite leaves more images than the truth, by more than 2 points and more than 1 image."""
    more: int = row[suite] - row["truth"]
    return more > max(1, 0.02 * row["images"])


def is_unmasked(row: Row) -> bool:
    """Return whether a row is of a net without a mask."""
    name: str = row["name"]
    return name.startswith("unmasked")


def share(rows: Sequence[Row], has: Callable[[Row], bool]) -> str:
    """Return how many of the rows have something, as text."""
    return f"{sum(map(has, rows))} of {len(rows)}"


def table(rows: Sequence[Row]) -> list[str]:
    """Return precision and recall in lines of Markdown, for all masks and for the halves of the known ones."""
    nets = [row for row in rows if is_unmasked(row)]
    lines = [
        "| masks | mislead AutoAttack, flagged | other masks, flagged | `auto` too high, no flag |",
        "|---|---|---|---|",
    ]
    parts = {"of the first gauntlet": "", "later, open half": "open", "later, kept aside": "aside"}
    for title, half in parts.items():
        these = [row for row in rows if not is_unmasked(row) and row["half"] == half]
        if not these:
            continue
        misled = [row for row in these if exceeds(row, "autoattack")]
        others = [row for row in these if row not in misled]
        high = share(these, lambda row: exceeds(row, "auto") and not row["flags"])
        lines.append(
            f"| {title} | {share(misled, lambda row: bool(row['flags']))} "
            f"| {share(others, lambda row: bool(row['flags']))} | {high} |"
        )
    flagged = [row for row in rows if row["flags"]]
    misled = [row for row in rows if not is_unmasked(row) and exceeds(row, "autoattack")]
    lines += [
        "",
        f"unmasked nets flagged: {share(nets, lambda row: bool(row['flags']))}",
        f"precision: {share(flagged, lambda row: not is_unmasked(row))} flagged rows are masks",
        f"recall: {share(misled, lambda row: bool(row['flags']))} masks that mislead AutoAttack are flagged",
    ]
    missed = [row for row in misled if not row["flags"]]
    alarms = [row for row in nets if row["flags"]]
    lines += [f"missed: {row['name']} around {row['net']}" for row in missed]
    lines += [f"false alarm: {row['name']}: {', '.join(row['flags'])}" for row in alarms]
    return lines


def main() -> None:
    """Read the rows and print the table; of a row recorded twice the later one counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path, nargs="+")
    given = parser.parse_args()
    rows = [row for path in given.rows for row in read(path)]
    print("\n".join(table(list({(row["name"], row["net"], str(row["threat"])): row for row in rows}.values()))))


if __name__ == "__main__":
    main()
