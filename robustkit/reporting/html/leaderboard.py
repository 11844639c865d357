"""The page about a leaderboard: one self-contained HTML file, made of the record."""

from __future__ import annotations

import shlex
from typing import Any

from robustkit.reporting.charts.classes import ClassRow
from robustkit.reporting.html.command import commands, suite
from robustkit.reporting.html.render import render
from robustkit.reporting.leaderboard import LEVEL, RULE, Leaderboard, Row, behind
from robustkit.reporting.sentences import counted
from robustkit.reporting.terminal.evaluation import interval, percent


def page(board: Leaderboard) -> str:
    """Return the page."""
    return render("leaderboard.html", _facts(board))


def _row(row: Row) -> dict[str, Any]:
    gap, ends, p = behind(row.behind)
    return {
        "rank": row.rank,
        "name": row.name,
        "page": f"{row.folder}/report.html",
        "clean": percent(row.clean_accuracy.value),
        "robust": percent(row.robust_accuracy.value),
        "ends": interval(row.robust_accuracy),
        "chart": ClassRow(row.name, row.clean_accuracy, row.robust_accuracy).chart,
        "behind": gap,
        "behind_ends": ends,
        "p": p,
        "gradients": f"{row.gradients_per_image:,.0f}",
        "doubts": row.doubts,
    }


def _headline(board: Leaderboard) -> str:
    """Return who is first, and with what, by the rule that the table is under."""
    title, rows = board.sections[0]
    where = f"of {counted(board.data['n'])} of {str(board.data['string']).rpartition('/')[2]} at {board.threat}"
    if title:
        return f"No model without a flag: every number {where} is in doubt"
    first = [row for row in rows if row.rank == 1]
    names, share = " and ".join(row.name for row in first), percent(first[0].robust_accuracy.value)
    if len(first) > 1:
        return f"{names} are level: {share} robust accuracy {where}"
    lead = rows[1].behind if len(rows) > 1 else None
    close = f", not clearly ahead of {rows[1].name} (p = {lead.p:.2g})" if lead and lead.p >= LEVEL else ""
    return f"{names}: {share} robust accuracy {where}{close}"


def _facts(board: Leaderboard) -> dict[str, Any]:
    versions = board.environment.get("versions", {})
    facts = {
        "data": board.data["string"],
        "device": board.environment.get("device_name") or board.environment.get("device"),
        "commit": board.environment.get("commit"),
        "versions": ", ".join(f"{name} {number}" for name, number in versions.items() if number),
    }
    return {
        "board": board,
        "sections": [(title, [_row(row) for row in rows]) for title, rows in board.sections],
        "headline": _headline(board),
        "rule": RULE,
        "models": [f"{row.name}={row.model}" for row in board.rows],
        **commands(
            board.environment,
            f"robustkit evaluate --models models.txt --data {shlex.quote(str(board.data['string']))} \\\n"
            f"    --limit {board.data['n']} --threat {board.threat} --seed {board.seed} \\\n"
            f"    --suite {shlex.quote(suite(board.suite))}",
        ),
        "facts": [(name, str(value)) for name, value in facts.items() if value not in (None, "")],
        "version": versions.get("robustkit") or "",
    }
