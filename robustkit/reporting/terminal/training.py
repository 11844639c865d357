"""A training run as a table for the terminal."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from robustkit.registry.decorators import ORIGIN
from robustkit.reporting.names import data_name
from robustkit.reporting.terminal.evaluation import duration, flag_lines, interval, percent
from robustkit.reporting.versions import made_in_parts
from robustkit.runs.report_parts import Rate
from robustkit.runs.training_record import Trained, TrainSpec

# Rows of a long run's table; the rest is in metrics.jsonl.
MAX_ROWS = 12
# Width of the widest table in characters.
TABLE_WIDTH = 110
# Measurements between members, and how to print them.
MEMBER_COLUMNS: dict[str, Callable[[float], str]] = {
    "any_right": percent,
    "transfer": percent,
    "white_box": percent,
    "cosine": "{:.2f}".format,
}


def show(record: Trained, console: Console, next_command: str | None = None, page: object = None) -> None:
    """Print model and method, epochs, accuracy, cost, flags, where the page is, and the next command."""
    spec = record.spec

    def line(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True)

    data = data_name(record.data)
    same_arch = record.members > 1 and not record.arch.startswith("ensemble:")
    nets = f"{record.members} x " if same_arch else ""
    line(
        f"run {record.run_id}   {spec['data']['n']:,} images of {data}   seed {spec['seed']}   {spec['precision']}"
    )
    size = f"{spec['epochs']} epochs, batch {spec['batch_size']}"
    line(f"{method_words(record.method)} on {nets}{record.arch}, {size}\n")
    _print(_epochs(record.history), console)
    if record.samples:
        line("")
        _print(_samples(record.samples), console)
    line("")
    if record.accuracy:
        rate = Rate(**record.accuracy)
        test_set = data_name(spec["test"]["string"])
        what = (
            f"mean of {len(record.samples)} samples" if record.samples else "mean of nets" if nets else "accuracy"
        )
        line(f"{what}   {percent(rate.value)} ({interval(rate)}) of {rate.n:,} images of {test_set}")
        if len(record.member_accuracy) > 1:
            line(f"each net   {', '.join(percent(share) for share in record.member_accuracy)}")
    cost = record.cost
    line(f"cost       {flops_words(cost['flops'])}   {duration(cost['seconds'])}")
    if versions := made_in_parts(record.environment):
        line(versions)
    for text in flag_lines(record.flags):
        line(text)
    if page:
        line(f"report     {page}")
    if next_command:
        line(f"next       {next_command}")


def show_history(spec: TrainSpec, history: Sequence[Mapping[str, Any]], console: Console) -> None:
    """Print the progress of a training run that is not finished."""
    title = f"run {spec.run_id}   {method_words(spec.method)}   {len(history)} of {spec.epochs} epochs\n"
    console.print(title, highlight=False, soft_wrap=True)
    _print(_epochs(history), console)


def method_words(method: Mapping[str, Any]) -> str:
    """Return a method with its fields, as the command line reads it."""
    fields = ",".join(f"{name}={value}" for name, value in method.items() if name not in ("name", *ORIGIN))
    return f"{method['name']}({fields})" if fields else str(method["name"])


def flops_words(flops: float) -> str:
    """Return 1.2e15 as `1.2 petaflop`."""
    for size, name in ((1e18, "exa"), (1e15, "peta"), (1e12, "tera")):
        if flops >= size:
            return f"{flops / size:.3g} {name}flop"
    return f"{flops / 1e9:.3g} gigaflop"


def _epochs(history: Sequence[Mapping[str, Any]]) -> Table:
    more = [name for name in MEMBER_COLUMNS if any(name in facts for facts in history)]
    table = _table("epoch", "loss", "test acc", *more, "rate", "images/s", "time")
    tested = [facts for facts in history if "test_accuracy" in facts] or list(history)
    stride = max(-(-len(tested) // MAX_ROWS), 1)
    for facts in reversed(tested[::-1][::stride]):
        accuracy = facts.get("test_accuracy")
        table.add_row(
            str(facts["epoch"]),
            f"{facts['loss']:.4f}",
            "–" if accuracy is None else percent(accuracy),
            *("–" if name not in facts else MEMBER_COLUMNS[name](facts[name]) for name in more),
            f"{facts['rate']:.3g}",
            f"{facts['images_per_second']:,.0f}",
            duration(facts["seconds"]),
        )
    return table


def _samples(samples: Sequence[Mapping[str, Any]]) -> Table:
    table = _table("sample", "cycle", "epoch", "rate", "test acc", "test loss")

    def cell(facts: Mapping[str, Any], name: str, form: str) -> str:
        value = facts.get(name)
        return "–" if value is None else format(value, form)

    for number, facts in enumerate(samples):
        accuracy = facts.get("accuracy")
        table.add_row(
            f"#{number}",
            *(cell(facts, name, form) for name, form in (("cycle", "d"), ("epoch", "d"), ("rate", ".3g"))),
            "–" if accuracy is None else percent(accuracy),
            cell(facts, "loss", ".4f"),
        )
    return table


def _print(table: Table, console: Console) -> None:
    """Print a table at its full width, so that a narrow console wraps lines instead of cutting numbers."""
    width = console.width
    console.width = max(width, TABLE_WIDTH)
    console.print(table, highlight=False)
    console.width = width


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="", padding=(0, 3, 0, 0))
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table
