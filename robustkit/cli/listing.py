"""`robustkit list`: everything that can be named, read from source text and catalogs. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Callable

from rich.console import Console
from rich.table import Table

from robustkit import registry
from robustkit.data.catalog import CATALOG
from robustkit.errors import did_you_mean
from robustkit.models.catalog import ZOO

Rows = list[dict[str, str]]


def show(what: str | None, as_json: bool) -> int:
    """Print one list, or all; return the exit code."""
    if what is not None and what not in LISTS:
        raise did_you_mean("list", what, LISTS)
    chosen = {name: make() for name, make in LISTS.items() if what in (None, name)}
    if as_json:
        print(json.dumps(chosen, indent=2))
        return 0
    terminal = Console(markup=False)
    console = terminal if terminal.is_terminal else Console(width=160, markup=False)
    for name, rows in chosen.items():
        if what is None:
            console.print(f"\n{name}", style="bold")
        if not rows:
            console.print("none yet")
            continue
        table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
        for column in rows[0]:
            table.add_column(column, no_wrap=column == "name", overflow="fold")
        for row in rows:
            table.add_row(*row.values())
        console.print(table, highlight=False)
    return 0


def _attacks() -> Rows:
    return [
        {
            "name": f"{name}:NAME" if entry.info.family else name,
            "norms": " ".join(entry.info.norms),
            "access": entry.info.access,
            "paper": entry.info.paper,
            "what": entry.summary,
        }
        for name, entry in registry.catalog("attack").items()
    ]


def _named(kind: str) -> Callable[[], Rows]:
    return lambda: [
        {"name": name, "paper": entry.info.paper, "what": entry.summary}
        for name, entry in registry.catalog(kind).items()
    ]


def _models() -> Rows:
    rows = [
        {"name": f"robustkit:{name}", "input": "x".join(map(str, entry.input)), "what": entry.description}
        for name, entry in ZOO.items()
    ]
    others = {
        "timm:NAME": "any timm model, pretrained unless @WEIGHTS or ?pretrained=false",
        "torchvision:NAME": "any torchvision classifier, likewise",
        "MODULE:FACTORY": "what an importable function returns",
        "FILE.py:FACTORY": "what a function in a file returns",
    }
    return rows + [{"name": name, "input": "", "what": what} for name, what in others.items()]


def _data() -> Rows:
    return [
        {
            "name": entry.example,
            "splits": " ".join(entry.splits),
            "usual threat": entry.threat or "",
            "what": entry.description,
        }
        for entry in CATALOG.values()
    ]


LISTS: dict[str, Callable[[], Rows]] = {
    "attacks": _attacks,
    "techniques": _named("technique"),
    "recipes": _named("recipe"),
    "defenses": _named("defense"),
    "suites": _named("suite"),
    "models": _models,
    "data": _data,
}
