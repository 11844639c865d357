"""The page about a leaderboard: one self-contained HTML file, made from the record."""

from __future__ import annotations

import shlex
from typing import Any

from robustkit.reporting.charts.classes import ClassRow
from robustkit.reporting.html.command import commands, suite
from robustkit.reporting.html.render import render
from robustkit.reporting.leaderboard import RULE, SIGNIFICANCE, Leaderboard, Row
from robustkit.reporting.sentences import counted
from robustkit.reporting.terminal.evaluation import interval, percent
from robustkit.reporting.terminal.leaderboard import difference_cells


def page(leaderboard: Leaderboard) -> str:
    """Return the page."""
    return render("leaderboard.html", _facts(leaderboard))


def _row(row: Row) -> dict[str, Any]:
    difference, ends, p = difference_cells(row.behind)
    return {
        "rank": row.rank,
        "name": row.name,
        "page": f"{row.folder}/report.html",
        "clean": percent(row.clean_accuracy.value),
        "robust": percent(row.robust_accuracy.value),
        "ends": interval(row.robust_accuracy),
        "chart": ClassRow(row.name, row.clean_accuracy, row.robust_accuracy).chart,
        "difference": difference,
        "difference_ends": ends,
        "p": p,
        "gradients": f"{row.gradients_per_image:,.0f}",
        "warnings": row.warnings,
    }


def _headline(leaderboard: Leaderboard) -> str:
    """Return the first model and its robust accuracy, with what the test says of the second."""
    title, rows = leaderboard.sections[0]
    data = str(leaderboard.data["string"]).rpartition("/")[2]
    where = f"of {counted(leaderboard.data['n'])} of {data} at {leaderboard.threat}"
    if title:
        return f"Every model has flags: each number {where} may be too high"
    first = [row for row in rows if row.rank == 1]
    names, share = " and ".join(row.name for row in first), percent(first[0].robust_accuracy.value)
    if len(first) > 1:
        return f"{names} are equal: {share} robust accuracy {where}"
    difference = rows[1].behind if len(rows) > 1 else None
    close = difference is not None and difference.p >= SIGNIFICANCE
    second = (
        f", not significantly more than {rows[1].name} (p = {difference.p:.2g})" if difference and close else ""
    )
    return f"{names}: {share} robust accuracy {where}{second}"


def _facts(leaderboard: Leaderboard) -> dict[str, Any]:
    versions = leaderboard.environment.get("versions", {})
    facts = {
        "data": leaderboard.data["string"],
        "device": leaderboard.environment.get("device_name") or leaderboard.environment.get("device"),
        "commit": leaderboard.environment.get("commit"),
        "versions": ", ".join(f"{name} {number}" for name, number in versions.items() if number),
    }
    return {
        "leaderboard": leaderboard,
        "sections": [(title, [_row(row) for row in rows]) for title, rows in leaderboard.sections],
        "headline": _headline(leaderboard),
        "rule": RULE,
        "models": [f"{row.name}={row.model}" for row in leaderboard.rows],
        **commands(
            leaderboard.environment,
            f"robustkit evaluate --models models.txt --data {shlex.quote(str(leaderboard.data['string']))} \\\n"
            f"    --limit {leaderboard.data['n']} --threat {leaderboard.threat} --seed {leaderboard.seed} \\\n"
            f"    --suite {shlex.quote(suite(leaderboard.suite))}",
        ),
        "facts": [(name, str(value)) for name, value in facts.items() if value not in (None, "")],
        "version": versions.get("robustkit") or "",
    }
