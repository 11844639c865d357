"""`robustkit evaluate --models`: a run for each model of a list, and a leaderboard."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from robustkit.cli import DONE, FAILED, USAGE
from robustkit.cli.gates import Gate
from robustkit.cli.output import save, save_page, wide_console
from robustkit.cli.progress import RunsDisplay
from robustkit.cli.streams import print_result
from robustkit.cli.verbs.report import write_page
from robustkit.core.errors import RobustkitError, RunError
from robustkit.engine.evaluation.leaderboard import LeaderboardRun, NamedModel
from robustkit.reporting.html.leaderboard import page
from robustkit.reporting.leaderboard import Leaderboard
from robustkit.reporting.terminal.leaderboard import show
from robustkit.reporting.terminal.transfer import short_names
from robustkit.runs.invocation import command

RECORD, PAGE = "leaderboard.json", "leaderboard.html"


@dataclass(frozen=True)
class ResultOptions:
    """How results are shown: with a page, as JSON instead of a table, and with an exit code by the gate."""

    with_page: bool
    as_json: bool
    gate: Gate


def shortened(entries: Sequence[NamedModel]) -> list[NamedModel]:
    """Return the entries with short names where the list gives none."""
    given = {entry.name for entry in entries if entry.name != entry.string}
    strings = [entry.string for entry in entries if entry.name == entry.string]
    short = {string: name for string, name in zip(strings, short_names(strings), strict=True) if name not in given}
    return [replace(entry, name=short.get(entry.name, entry.name)) for entry in entries]


def run_leaderboard(models: LeaderboardRun, id: str, folder: Path, overwrite: bool, options: ResultOptions) -> int:
    """Evaluate the models; return 3 if one failed while running, 2 if before, else the code of the gate."""
    display = RunsDisplay()
    found, failed = [], []
    code = DONE
    for entry, outcome in zip(models.entries, models.run(folder, display, display.of_run, overwrite), strict=True):
        if isinstance(outcome, RobustkitError):
            failed.append((entry.name, entry.string, str(outcome)))
            code = max(code, FAILED if isinstance(outcome, RunError) else USAGE)
            continue
        place, report = outcome
        found.append((entry.name, place.name, report))
        if options.with_page:
            write_page(place, report)
    if not found:
        return code
    board = Leaderboard.of(id, found, failed)
    # A run that was finished before holds the command that started it.
    board = replace(board, environment={**board.environment, "command": command()})
    save(folder / RECORD, (json.dumps(board.to_json(), indent=2) + "\n").encode())
    shown = None
    if options.with_page:
        shown = save_page(folder / PAGE, page(board).encode())
    results = [(row.name, row.robust_accuracy, row.flags) for row in board.rows]
    if options.as_json:
        print_result(json.dumps(board.to_json() | options.gate.record(results), indent=2))
    else:
        runs = [folder / row.folder for row in board.rows[:2]]
        following = f"compare {runs[0]} {runs[1]}" if len(runs) > 1 else f"verify {runs[0]}"
        show(board, wide_console(), shown, f"robustkit {following}")
    passed = options.gate.check(results)
    return code or passed
