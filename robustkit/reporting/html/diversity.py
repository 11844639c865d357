"""How far an ensemble's members share weaknesses: a table for the terminal, and one self-contained HTML page."""

from __future__ import annotations

import shlex
from typing import Any

from rich.console import Console
from rich.table import Table

from robustkit.reporting.html.command import commands
from robustkit.reporting.html.render import render
from robustkit.reporting.names import data_name
from robustkit.reporting.terminal.evaluation import duration, flag_lines
from robustkit.reporting.terminal.transfer import short_names
from robustkit.runs.diversity_record import Bounds, Diversity
from robustkit.runs.evaluation_record import Rate

# The page in a run folder.
FILE = "diversity.html"
BOUNDS = {"ensemble": "ensemble", "best": "best member", "any": "any member", "all": "all members"}


def show(record: Diversity, console: Console, page: object = None, next_command: str | None = None) -> None:
    """Print the matrix, the bounds, diversity and cosines, what it cost, and the next command."""

    def line(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True)

    spec, heads = record.spec, _heads(record)
    data = data_name(spec.data["string"])
    line(f"diversity {record.run_id}   {record.n} images of {data}   {spec.threat}   seed {spec.seed}")
    line(
        f"PGD on each member, {spec.steps} steps, {spec.restarts} restarts; in %, of the {len(record.index)} "
        "images that every member has right\n"
    )
    table = _table("fooled", *heads)
    for number, row in enumerate(record.transfer):
        table.add_row(
            heads[number], *(_number(rate) + ("*" if place == number else "") for place, rate in enumerate(row))
        )
    table.add_row("any other", *(_number(rate) for rate in record.worst))
    console.print(table, highlight=False)
    line("* made on this very member; any other: by images made on any member but this one\n")
    table = _table("right", *BOUNDS.values())
    for name, bounds in _bounds(record):
        table.add_row(name, *(_with_ends(getattr(bounds, of)) for of in BOUNDS))
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
    return f"Images made on one member fool another in {100 * record.between:.1f} % of cases on average."


def page(record: Diversity) -> str:
    """Return the page."""
    return render("diversity.html", _facts(record))


def _facts(record: Diversity) -> dict[str, Any]:
    spec, heads = record.spec, _heads(record)
    versions = record.environment.get("versions", {})
    facts = {
        "model": spec.model["string"],
        "data": spec.data["string"],
        "images": "positions in diversity.json",
        "distillation": ", ".join(
            f"{name} {value}" for name, value in sorted(record.distillation.items()) if name != "layers"
        ),
        "device": record.environment.get("device_name") or record.environment.get("device"),
        "commit": record.environment.get("commit"),
        "versions": ", ".join(f"{name} {number}" for name, number in sorted(versions.items()) if number),
    }
    model, data, threat = map(shlex.quote, map(str, (spec.model["string"], spec.data["string"], spec.threat)))
    return {
        "record": record,
        "name": short_names([str(spec.model["string"])])[0],
        "data": data_name(spec.data["string"]),
        "verdict": verdict(record),
        "heads": heads,
        "transfer": [
            {
                "name": heads[number],
                "cells": [{**_cell(rate), "same": place == number} for place, rate in enumerate(row)],
            }
            for number, row in enumerate(record.transfer)
        ]
        + [{"name": "any other", "cells": [{**_cell(rate), "same": False} for rate in record.worst]}],
        "bound_heads": list(BOUNDS.values()),
        "bounds": [
            {"name": name, "cells": [_cell(getattr(bounds, of)) for of in BOUNDS]}
            for name, bounds in _bounds(record)
        ],
        "seen": [
            {"name": heads[number], "cells": [f"{value:.2f}" for value in (*apart, *alike)]}
            for number, (apart, alike) in enumerate(zip(record.diversity, record.cosine, strict=True))
        ],
        "following": f"robustkit evaluate {model} --data {data} --threat {threat}",
        **commands(
            record.environment,
            f"robustkit diversity {model} --data {data} --limit {spec.data['n']} \\\n"
            f"    --threat {threat} --steps {spec.steps} --restarts {spec.restarts} --seed {spec.seed}",
        ),
        "facts": [(name, str(value)) for name, value in facts.items() if value not in (None, "")],
        "version": versions.get("robustkit") or "",
    }


def _heads(record: Diversity) -> list[str]:
    return [*(f"#{number}" for number in range(record.members)), "ensemble"]


def _bounds(record: Diversity) -> list[tuple[str, Bounds]]:
    under = [(f"attack on #{number}", bounds) for number, bounds in enumerate(record.attacked)]
    return [(f"clean, of {record.n}", record.clean), *under]


def _cell(rate: Rate) -> dict[str, Any]:
    return {
        "share": round(rate.value, 3),
        "text": _number(rate),
        "ends": f"{100 * rate.low:.0f} – {100 * rate.high:.0f}",
    }


def _with_ends(rate: Rate) -> str:
    return f"{_number(rate)} ({100 * rate.low:.1f} – {100 * rate.high:.1f})"


def _number(rate: Rate) -> str:
    return f"{100 * rate.value:.1f}"


def _table(first: str, *columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="", padding=(0, 3, 0, 0))
    table.add_column(first, no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table
