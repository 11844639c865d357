"""`robustkit report`: the page and the card of a finished run, from its folder alone."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from robustkit.cli.output import save
from robustkit.engine import folder as run_folder
from robustkit.record import Report
from robustkit.report.html import page
from robustkit.report.table import show


def report(folder: Path, *, html: Path | None, png: Path | None) -> int:
    """Run the verb; without files it prints the table and writes the page into the folder."""
    record = run_folder.read_report(folder)
    examples = run_folder.read_examples(folder, record)
    written = []
    if html is None and png is None:
        html = folder / run_folder.PAGE
        show(record, Console(markup=False))
        print()
    if html is not None:
        save(html, page(record, examples).encode())
        written.append(f"report   {html}")
    if png is not None:
        from robustkit.report.png import card

        save(png, card(record))
        written.append(f"card     {png}")
    print("\n".join(written))
    return 0


def write_page(folder: Path, record: Report) -> None:
    """Write report.html into a run folder unless it is there."""
    if not (folder / run_folder.PAGE).exists():
        content = page(record, run_folder.read_examples(folder, record)).encode()
        run_folder.write(folder / run_folder.PAGE, content)
