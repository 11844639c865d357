"""`robustkit list`: all names, read from source text and catalogs. Imports no torch."""

from __future__ import annotations

import json
import shutil
import textwrap
from collections.abc import Callable

from robustkit import registry
from robustkit.api.options.runs import ListFlags
from robustkit.cli.streams import print_result, results
from robustkit.cli.verbs import about
from robustkit.core.errors import did_you_mean
from robustkit.data.catalog import CATALOG
from robustkit.models.sources.kinds import FORMS
from robustkit.models.sources.source import own_sources
from robustkit.registry.plugins import plugins

Rows = list[dict[str, str]]

WIDTH = 160


def show(flags: ListFlags) -> int:
    """Print one list, all lists, or the entries of a name; return the exit code."""
    what, as_json = flags.what, flags.json
    if what is not None and what not in LISTS:
        if about.kinds_of(what):
            return about.show(what, as_json)
        raise did_you_mean("list or name", what, LISTS, about.names())
    chosen = {name: make() for name, make in LISTS.items() if what in (None, name)}
    if as_json:
        print_result(json.dumps(chosen, indent=2))
        return 0
    # Plain text: importing rich takes longer than all of this.
    width = shutil.get_terminal_size().columns if results().isatty() else WIDTH
    for name, rows in chosen.items():
        if what is None:
            print_result(f"\n{name}")
        print_result("\n".join(_lines(rows, width)) if rows else "none yet")
    return 0


def _lines(rows: Rows, width: int) -> list[str]:
    """Return rows below the names of their columns; the last column is wrapped to the width."""
    if not any(row.get("package") for row in rows):
        rows = [{name: value for name, value in row.items() if name != "package"} for row in rows]
    table = [list(rows[0]), *(list(row.values()) for row in rows)]
    *sizes, _ = (max(map(len, column)) + 2 for column in zip(*table, strict=True))
    lines = []
    for cells in table:
        begun = "".join(cell.ljust(size) for cell, size in zip(cells, sizes, strict=False))
        parts = textwrap.wrap(cells[-1], max(width - len(begun), 20)) or [""]
        lines += [begun + parts[0], *(" " * len(begun) + part for part in parts[1:])]
    return [line.rstrip() for line in lines]


def _attacks() -> Rows:
    return [
        {
            "name": f"{name}:NAME" if entry.info.family else name,
            "norms": " ".join(entry.info.norms),
            "access": entry.info.access,
            "paper": entry.info.paper,
            **_what(entry),
        }
        for name, entry in registry.catalog("attack").items()
    ]


def _what(entry: registry.Entry) -> dict[str, str]:
    """Return the columns of the installed package that something comes from, and of what it is."""
    return {"package": entry.package, "what": entry.summary}


def _named(kind: str) -> Callable[[], Rows]:
    return lambda: [
        {"name": name, "paper": entry.info.paper, **_what(entry)} for name, entry in registry.catalog(kind).items()
    ]


def _defenses() -> Rows:
    return [
        {"name": entry.form, "paper": entry.info.paper, **_what(entry)}
        for entry in registry.catalog("defense").values()
    ]


def _methods() -> Rows:
    return [
        {
            "name": name,
            "paper": entry.info.paper,
            "fields": " ".join(field.name for field in entry.fields),
            **_what(entry),
        }
        for name, entry in sorted(registry.catalog("method").items())
    ]


def _models() -> Rows:
    def row(name: str, what: str, size: str = "", package: str = "") -> dict[str, str]:
        return {"name": name, "input": size, "package": package, "what": what}

    rows: Rows = []
    installed: Rows = []
    unlisted: Rows = []
    for source in own_sources():
        for name, net in source.nets.items():
            rows.append(row(f"{source.prefix}:{name}", net.description, "x".join(map(str, net.input))))
        if not source.nets:
            unlisted.append(row(f"{source.prefix}:{source.placeholder}", source.help))
    for prefix, plugin in plugins("models").items():
        installed.append(row(f"{prefix}:NAME", plugin.summary, package=plugin.package))
    return [*rows, *installed, *unlisted, *(row(form, what) for form, what in FORMS.items())]


def _data() -> Rows:
    return [
        {
            "name": entry.example,
            "splits": " ".join(entry.splits),
            "usual threat": entry.threat or "",
            "package": "",
            "what": entry.description,
        }
        for entry in CATALOG.values()
    ] + [
        {
            "name": f"{name}:SPLIT",
            "splits": "",
            "usual threat": "",
            "package": plugin.package,
            "what": plugin.summary,
        }
        for name, plugin in plugins("data").items()
    ]


LISTS: dict[str, Callable[[], Rows]] = {
    "attacks": _attacks,
    "techniques": _named("technique"),
    "recipes": _named("recipe"),
    "methods": _methods,
    "defenses": _defenses,
    "suites": _named("suite"),
    "models": _models,
    "data": _data,
}
