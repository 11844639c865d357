"""The accuracy on corrupted images as a table for the terminal."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console
from rich.table import Table

from robustkit.data.corruptions.names import FAMILIES
from robustkit.reporting.names import data_name
from robustkit.reporting.terminal.evaluation import duration, flag_lines
from robustkit.runs.corruption_record import Corruptions
from robustkit.runs.report_parts import Rate


def show(record: Corruptions, console: Console, page: object = None) -> None:
    """Print the accuracies, their mean, flags and cost."""

    def line(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True)

    spec = record.spec
    line(f"run {record.run_id}   {record.n:,} images of {data_name(spec.data['string'])}   seed {spec.seed}")
    line("accuracy in %, by severity\n")
    table = Table(box=None, pad_edge=False, header_style="", padding=(0, 3, 0, 0))
    table.add_column("corruption", no_wrap=True)
    for head in (*map(str, spec.severities), "mean"):
        table.add_column(head, justify="right", no_wrap=True)
    for _, name, rates, mean in rows(record):
        table.add_row(name, *(percent(rate.value) for rate in rates), percent(mean))
    console.print(table, highlight=False)
    line("")
    for name, text in summary(record):
        line(f"{name:22}{text}")
    for text in flag_lines(record.flags):
        line(text)
    line(f"\n{record.cost.forwards:,} forward passes   {duration(record.cost.seconds)}")
    if page:
        line(f"report   {page}")


def rows(record: Corruptions) -> Iterator[tuple[str, str, list[Rate], float]]:
    """Yield family, name, accuracies by severity and their mean of each corruption."""
    for family, names in FAMILIES.items():
        for name in names:
            if name in record.accuracy:
                yield family, name.replace("_", " "), list(record.accuracy[name]), record.mean_accuracy[name]


def summary(record: Corruptions) -> list[tuple[str, str]]:
    """Return the clean accuracy, the mean accuracy and the mean error, each with its name."""
    lines = []
    if record.clean is not None:
        lines.append(("clean accuracy", _with_ends(record.clean)))
    lines.append(("mean accuracy", _with_ends(record.mean)))
    lines.append(("mean corruption error", f"{percent(record.mean_error)} %, not divided by another model's"))
    if record.relative_error is not None:
        lines.append(("mCE (AlexNet = 100)", percent(record.relative_error)))
    return lines


def percent(share: float) -> str:
    """Return a share in percent, without the sign."""
    return f"{100 * share:.1f}"


def _with_ends(rate: Rate) -> str:
    return f"{percent(rate.value)} % ({percent(rate.low)} – {percent(rate.high)})"
