"""The diversity of an ensemble as tables for the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from robustkit.reporting.names import data_name
from robustkit.reporting.terminal.evaluation import duration, flag_lines
from robustkit.runs.diversity_record import Bounds, Diversity
from robustkit.runs.report_parts import Rate

# The accuracies with their names: of the ensemble, of its best member, with any or with all members right.
BOUNDS = {"ensemble": "ensemble", "best": "best member", "any": "any member", "all": "all members"}


def show(record: Diversity, console: Console, page: object = None, next_command: str | None = None) -> None:
    """Print the matrix, the accuracies, diversity, cosine and cost, and the next command."""

    def line(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True)

    spec, names = record.spec, heads(record)
    data = data_name(spec.data["string"])
    line(f"diversity {record.run_id}   {record.n} images of {data}   {spec.threat}   seed {spec.seed}")
    line(
        f"PGD on each member, {spec.steps} steps, {spec.restarts} restarts; in % of the {len(record.index)} "
        "images that every member classifies correctly\n"
    )
    table = _table("fooled", *names)
    for member, row in enumerate(record.transfer):
        table.add_row(
            names[member], *(number(rate) + ("*" if column == member else "") for column, rate in enumerate(row))
        )
    table.add_row("any other", *(number(rate) for rate in record.worst))
    console.print(table, highlight=False)
    line("* crafted on the member itself; any other: fooled by images crafted on any other member\n")
    table = _table("accuracy", *BOUNDS.values())
    for name, bounds in bounds_rows(record):
        table.add_row(name, *(_with_ends(getattr(bounds, key)) for key in BOUNDS))
    console.print(table, highlight=False)
    line(f"\n{verdict(record)}")
    line(
        f"diversity d {record.apartness:.2f}   gradient cosine {record.alignment:.2f}   "
        f"{duration(record.cost.seconds)}"
    )
    for text in flag_lines(record.flags):
        line(text)
    if page:
        line(f"\nreport   {page}")
    if next_command:
        line(f"next     {next_command}")


def verdict(record: Diversity) -> str:
    """Return the mean transfer in a sentence."""
    return f"Images crafted on one member fool another in {100 * record.between:.1f} % of cases on average."


def heads(record: Diversity) -> list[str]:
    """Return the columns' names: the members' numbers, and the ensemble."""
    return [*(f"#{number}" for number in range(record.members)), "ensemble"]


def bounds_rows(record: Diversity) -> list[tuple[str, Bounds]]:
    """Return the accuracies on clean images, and under the attack on each member."""
    attacked = [(f"attack on #{number}", bounds) for number, bounds in enumerate(record.attacked)]
    return [(f"clean, of {record.n}", record.clean), *attacked]


def _with_ends(rate: Rate) -> str:
    return f"{number(rate)} ({100 * rate.low:.1f} – {100 * rate.high:.1f})"


def number(rate: Rate) -> str:
    """Return a rate in percent, without the sign."""
    return f"{100 * rate.value:.1f}"


def _table(first: str, *columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="", padding=(0, 3, 0, 0))
    table.add_column(first, no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table
