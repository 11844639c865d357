"""`robustkit report`: the page of a run and the card of an evaluation, made from the run folder only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from robustkit.api.options.runs import ReportFlags
from robustkit.cli.output import result_console, save, save_page, wide_console
from robustkit.cli.streams import print_result
from robustkit.core.errors import UsageError
from robustkit.runs import run_folder
from robustkit.runs.evaluation_record import Report


@dataclass(frozen=True)
class View:
    """How a run is shown: its table, its page with the file name in the run folder, its card."""

    show: Callable[[], None]
    page: Callable[[], str]
    file: str = run_folder.PAGE
    card: Callable[[], bytes] | None = None


def report(flags: ReportFlags) -> int:
    """Run the verb; without --html and --png it prints the table and writes the page into the folder."""
    folder, html, png = flags.folder, flags.html, flags.png
    view = VIEWS[run_folder.kind(folder)](folder)
    if png is not None and view.card is None:
        raise UsageError(f"{folder} is no evaluation, and only evaluations have cards; use --html FILE.")
    written = []
    if html is None and png is None:
        view.show()
        print_result()
        if page := save_page(folder / view.file, view.page().encode()):
            written.append(f"report   {page}")
    if html is not None:
        save(html, view.page().encode())
        written.append(f"report   {html}")
    if png is not None and view.card is not None:
        save(png, view.card())
        written.append(f"card     {png}")
    for line in written:
        print_result(line)
    return 0


def write_page(folder: Path, record: Report) -> None:
    """Write report.html into a run folder unless it exists."""
    from robustkit.reporting.html.evaluation import page

    if not (folder / run_folder.PAGE).exists():
        content = page(record, run_folder.read_examples(folder, record)).encode()
        save_page(folder / run_folder.PAGE, content)


def _evaluation(folder: Path) -> View:
    from robustkit.reporting.html.evaluation import page
    from robustkit.reporting.terminal.evaluation import show

    record = run_folder.read_report(folder)
    examples = run_folder.read_examples(folder, record)

    def card() -> bytes:
        from robustkit.reporting.charts.card import card

        if record.minimum:
            raise UsageError(f"{folder} holds minimum norms, and a card shows robust accuracy; use --html FILE.")
        return card(record)

    return View(lambda: show(record, result_console()), lambda: page(record, examples), card=card)


def craft_view(folder: Path) -> View:
    """Return the view of a craft run."""
    from robustkit.reporting.html.craft import page
    from robustkit.reporting.terminal.transfer import show

    record = run_folder.read_craft(folder)
    examples = run_folder.read_examples(folder, record)
    return View(lambda: show(record, wide_console()), lambda: page(record, examples))


def training_view(folder: Path) -> View:
    """Return the view of a training run, finished or in progress."""
    from robustkit.reporting.html.training import page
    from robustkit.reporting.terminal.training import show, show_history

    spec, history, record = run_folder.read_training(folder)

    def table() -> None:
        if record:
            show(record, result_console())
        else:
            show_history(spec, history, result_console())

    return View(table, lambda: page(spec, history, record))


def _matrix(folder: Path) -> View:
    from robustkit.reporting.html.matrix import FILE, page
    from robustkit.reporting.terminal.transfer import show_matrix

    record = run_folder.read_matrix(folder)
    return View(lambda: show_matrix(record, wide_console()), lambda: page(record), FILE)


def _diversity(folder: Path) -> View:
    from robustkit.reporting.html.diversity import FILE, page
    from robustkit.reporting.terminal.diversity import show

    record = run_folder.read_diversity(folder)
    return View(lambda: show(record, wide_console()), lambda: page(record), FILE)


def _corruptions(folder: Path) -> View:
    from robustkit.reporting.html.corruptions import FILE, page
    from robustkit.reporting.terminal.corruptions import show

    record = run_folder.read_corruptions(folder)
    return View(lambda: show(record, result_console()), lambda: page(record), FILE)


VIEWS = {
    "evaluate": _evaluation,
    "craft": craft_view,
    "train": training_view,
    "matrix": _matrix,
    "diversity": _diversity,
    "corrupt": _corruptions,
}
