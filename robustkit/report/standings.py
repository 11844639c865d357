"""The page about a leaderboard: one self-contained HTML file, made of the record."""

from __future__ import annotations

import shlex
from typing import Any

from robustkit.report.classes import ClassRow
from robustkit.report.command import suite
from robustkit.report.leaderboard import Leaderboard, behind
from robustkit.report.render import render
from robustkit.report.table import interval, percent
from robustkit.report.words import counted


def page(board: Leaderboard) -> str:
    """Return the page."""
    return render("leaderboard.html", _facts(board))


def _facts(board: Leaderboard) -> dict[str, Any]:
    versions, rows = board.environment.get("versions", {}), []
    for place, row in enumerate(board.rows, 1):
        gap, ends, p = behind(row.behind)
        rows.append(
            {
                "place": place,
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
        )
    facts = {
        "data": board.data["string"],
        "device": board.environment.get("device_name") or board.environment.get("device"),
        "commit": board.environment.get("commit"),
        "versions": ", ".join(f"{name} {number}" for name, number in versions.items() if number),
    }
    return {
        "board": board,
        "rows": rows,
        "best": rows[0],
        "images": counted(board.data["n"]),
        "data": str(board.data["string"]).rpartition("/")[2],
        "models": [f"{row.name}={row.model}" for row in board.rows],
        "command": f"robustkit evaluate --models models.txt --data {shlex.quote(str(board.data['string']))} \\\n"
        f"    --limit {board.data['n']} --threat {board.threat} --seed {board.seed} \\\n"
        f"    --suite {shlex.quote(suite(board.suite))}",
        "facts": [(name, str(value)) for name, value in facts.items() if value not in (None, "")],
        "version": versions.get("robustkit") or "",
    }
