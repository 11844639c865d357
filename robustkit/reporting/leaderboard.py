"""Several models under the same attacks, the most robust first: leaderboard.json, and a table for the terminal."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from robustkit.core.errors import UsageError
from robustkit.core.flags import Flag
from robustkit.core.schema import FORMAT
from robustkit.reporting.names import data_name
from robustkit.reporting.paired import compare
from robustkit.reporting.terminal.evaluation import interval, percent
from robustkit.runs.evaluation_record import Rate, Report, dumps

# The title of the models whose numbers are in doubt.
APART = "ranked apart: flags put these numbers in doubt"
# The one rule for two neighbours, wherever their order is spoken of.
LEVEL = 0.05
RULE = f"where p is {LEVEL} or more, these images do not tell which of the two is more robust"


@dataclass(frozen=True)
class Behind:
    """By how much a model's robust accuracy is behind that of the one above it, on the `n` images of both.

    `low` and `high` are the ends of Newcombe's 95 % interval for paired shares; `p` is McNemar's, exact and
    two-sided, of this pair alone: no correction for there being several.
    """

    value: float
    low: float
    high: float
    p: float
    n: int


@dataclass(frozen=True)
class Row:
    """One model.

    Attributes:
        rank: from 1, among the models with flags or among those without; the same for equal robust accuracies.
        behind: None for the first of either, and where the two were not given the same images.
    """

    rank: int
    name: str
    model: str
    folder: str
    run_id: str
    n: int
    clean_accuracy: Rate
    robust_accuracy: Rate
    behind: Behind | None
    gradients_per_image: float
    forwards_per_image: float
    flags: Sequence[Flag]

    @property
    def doubts(self) -> list[str]:
        """The codes of its warnings and errors; with any, it is ranked apart."""
        return doubts(self.flags)


@dataclass(frozen=True)
class Failure:
    """A model of the list that could not be loaded or evaluated, and why."""

    name: str
    model: str
    reason: str


@dataclass(frozen=True)
class Leaderboard:
    """What is in leaderboard.json; `id` is that of data, threat, suite and seed, whichever the models."""

    id: str
    data: Mapping[str, Any]
    threat: str
    suite: Sequence[Mapping[str, Any]]
    seed: int
    rows: Sequence[Row]
    failed: Sequence[Failure]
    environment: Mapping[str, Any]
    format: int = FORMAT

    @classmethod
    def of(
        cls, id: str, found: Sequence[tuple[str, str, Report]], failed: Sequence[tuple[str, str, str]]
    ) -> Leaderboard:
        """Return the board of name, folder and report of each finished run, one at least.

        Models whose flags put their numbers in doubt come after all others, with ranks of their own. Ties share a
        rank and stand in the order of their clean accuracy. `failed` are name, model string and reason.
        """
        order = sorted(
            found,
            key=lambda one: (
                bool(doubts(one[2].flags)),
                -one[2].robust_accuracy.value,
                -one[2].clean_accuracy.value,
                one[0],
            ),
        )
        first = order[0][2]
        parts = [[one for one in order if bool(doubts(one[2].flags)) == doubted] for doubted in (False, True)]
        return cls(
            id=id,
            data=first.spec.data,
            threat=first.spec.threat,
            suite=first.spec.suite,
            seed=first.spec.seed,
            rows=[row for part in parts for row in _ranked(part)],
            failed=[Failure(*one) for one in failed],
            environment=first.environment,
        )

    @property
    def sections(self) -> list[tuple[str, list[Row]]]:
        """The ranked models, and those ranked apart under a title; without empty ones."""
        parts = [("", [row for row in self.rows if not row.doubts])]
        parts += [(APART, [row for row in self.rows if row.doubts])]
        return [(title, rows) for title, rows in parts if rows]

    def to_json(self) -> dict[str, Any]:
        """Return the record as leaderboard.json holds it, `format` first."""
        body = json.loads(dumps(self))
        return {"format": body.pop("format"), **body}


def doubts(flags: Sequence[Flag]) -> list[str]:
    """Return the codes of the flags that put a robust accuracy in doubt: warnings and errors."""
    return [flag.code for flag in flags if flag.warns]


def _ranked(found: Sequence[tuple[str, str, Report]]) -> list[Row]:
    """Return the rows of models in their order."""
    rows: list[Row] = []
    above: Report | None = None
    for place, (name, folder, report) in enumerate(found, 1):
        tied = above is not None and above.robust_accuracy.value == report.robust_accuracy.value
        rows.append(
            Row(
                rank=rows[-1].rank if tied else place,
                name=name,
                model=report.spec.model["string"],
                folder=folder,
                run_id=report.run_id,
                n=report.n,
                clean_accuracy=report.clean_accuracy,
                robust_accuracy=report.robust_accuracy,
                behind=_behind(above, report) if above else None,
                gradients_per_image=report.cost.backwards / report.n,
                forwards_per_image=report.cost.forwards / report.n,
                flags=report.flags,
            )
        )
        above = report
    return rows


def _behind(above: Report, report: Report) -> Behind | None:
    if above.spec.data["fingerprint"] != report.spec.data["fingerprint"]:
        return None
    try:
        found = compare(above, report)
    except UsageError:
        return None  # both stopped early, and have no image in common
    return Behind(found.difference, found.low, found.high, found.p, found.n)


def show(board: Leaderboard, console: Console, page: object = None, next_command: str | None = None) -> None:
    """Print the board, what raised flags, what failed, where the page is, and the next command."""

    def line(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True)

    data = data_name(board.data["string"])
    count = f"{len(board.rows)} model{'s' * (len(board.rows) != 1)}"
    images = f"{board.data['n']} image{'s' * (board.data['n'] != 1)}"
    line(f"leaderboard {board.id}   {count}   {images} of {data}   {board.threat}   seed {board.seed}\n")
    table = Table(box=None, pad_edge=False, header_style="", padding=(0, 3, 0, 0))
    table.add_column("", justify="right", no_wrap=True)
    table.add_column("model", no_wrap=True)
    for column in ("clean acc", "robust acc", "95% interval", "behind", "95% interval", "p", "grads/img", "flags"):
        table.add_column(column, justify="right", no_wrap=True)
    for title, rows in board.sections:
        if title:
            table.add_row("", title)
        for row in rows:
            table.add_row(
                str(row.rank),
                row.name,
                percent(row.clean_accuracy.value),
                percent(row.robust_accuracy.value),
                interval(row.robust_accuracy),
                *behind(row.behind),
                f"{row.gradients_per_image:,.0f}",
                str(len(row.doubts) or "–"),
            )
    console.print(table, highlight=False)
    line("behind: the model above, in points, on the same images (paired; p: McNemar's, of this pair alone)")
    line(RULE)
    for row in board.rows:
        if row.doubts:
            line(f"flags    {row.name}: {', '.join(row.doubts)}")
    for failure in board.failed:
        line(f"failed   {failure.name}: {failure.reason}")
    if page:
        line(f"\nreport   {page}")
    if next_command:
        line(f"next     {next_command}")


def behind(found: Behind | None) -> tuple[str, str, str]:
    """Return how far a model is behind, the ends of the interval, and p; dashes where there is nothing to say."""
    if found is None:
        return "–", "–", "–"
    return points(found.value), f"{points(found.low)} – {points(found.high)}", f"{found.p:.2g}"


def points(share: float) -> str:
    """Return 0.125 as `12.5`, with a true minus sign."""
    return f"{100 * share:.1f}".replace("-0.0", "0.0").replace("-", "−")
