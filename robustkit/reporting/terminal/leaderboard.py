"""The leaderboard as a table for the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from robustkit.reporting.leaderboard import RULE, Leaderboard, PairedDifference
from robustkit.reporting.names import data_name
from robustkit.reporting.terminal.evaluation import interval, percent

COLUMNS = ("clean acc", "robust acc", "95% interval", "difference", "95% interval", "p", "grads/img", "flags")
DIFFERENCE = (
    "difference: to the next model above, in points of robust accuracy, on the same images "
    "(p: McNemar's test of this pair)"
)


def show(leaderboard: Leaderboard, console: Console, page: object = None, next_command: str | None = None) -> None:
    """Print the leaderboard, flags, failed models, where the page is, and the next command."""

    def line(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True)

    data = data_name(leaderboard.data["string"])
    count = f"{len(leaderboard.rows)} model{'s' * (len(leaderboard.rows) != 1)}"
    images = f"{leaderboard.data['n']} image{'s' * (leaderboard.data['n'] != 1)} of {data}"
    threat = f"{leaderboard.threat}   seed {leaderboard.seed}"
    line(f"leaderboard {leaderboard.id}   {count}   {images}   {threat}\n")
    table = Table(box=None, pad_edge=False, header_style="", padding=(0, 3, 0, 0))
    table.add_column("", justify="right", no_wrap=True)
    table.add_column("model", no_wrap=True)
    for column in COLUMNS:
        table.add_column(column, justify="right", no_wrap=True)
    for title, rows in leaderboard.sections:
        if title:
            table.add_row("", title)
        for row in rows:
            table.add_row(
                str(row.rank),
                row.name,
                percent(row.clean_accuracy.value),
                percent(row.robust_accuracy.value),
                interval(row.robust_accuracy),
                *difference_cells(row.behind),
                f"{row.gradients_per_image:,.0f}",
                str(len(row.warnings) or "–"),
            )
    console.print(table, highlight=False)
    line(DIFFERENCE)
    line(RULE)
    for row in leaderboard.rows:
        if row.warnings:
            line(f"flags    {row.name}: {', '.join(row.warnings)}")
    for failure in leaderboard.failed:
        line(f"failed   {failure.name}: {failure.reason}")
    if page:
        line(f"\nreport   {page}")
    if next_command:
        line(f"next     {next_command}")


def difference_cells(difference: PairedDifference | None) -> tuple[str, str, str]:
    """Return difference, ends of its interval and p as text; dashes for None."""
    if difference is None:
        return "–", "–", "–"
    ends = f"{points(difference.low)} – {points(difference.high)}"
    return points(difference.value), ends, f"{difference.p:.2g}"


def points(share: float) -> str:
    """Return 0.125 as `12.5`, with a true minus sign."""
    return f"{100 * share:.1f}".replace("-0.0", "0.0").replace("-", "−")
