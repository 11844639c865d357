"""The page about a transfer matrix: one self-contained HTML file with a heat map."""

from __future__ import annotations

from typing import Any

from robustkit.reporting.html.command import commands
from robustkit.reporting.html.render import render
from robustkit.reporting.names import data_name
from robustkit.reporting.terminal.transfer import attack_words, short_names
from robustkit.runs.craft_record import Matrix
from robustkit.runs.report_parts import Rate
from robustkit.runs.spec import dumps

# The page in a run folder.
FILE = "matrix.html"


def page(record: Matrix) -> str:
    """Return the page."""
    return render("matrix.html", _facts(record))


def _facts(record: Matrix) -> dict[str, Any]:
    names = short_names([*record.models, *record.targets])
    own = len(record.models)
    rows = [
        {
            "name": names[index],
            "gradients": f"{record.gradients_per_image[index]:,.0f}",
            "cells": [
                _cell(rate, names[index], names[column], index == column) for column, rate in enumerate(rates)
            ],
            "mean": _mean([rate for column, rate in enumerate(rates) if column != index]),
        }
        for index, rates in enumerate(record.success)
    ]
    versions = record.environment.get("versions", {})
    facts = {
        "data": record.data["string"],
        "threat": record.threat,
        "attack": dumps({key: value for key, value in record.attack.items() if key != "string"}),
        "seed": record.seed,
        "device": record.environment.get("device_name") or record.environment.get("device"),
        "commit": record.environment.get("commit"),
        "versions": ", ".join(f"{name} {number}" for name, number in sorted(versions.items()) if number),
    }
    return {
        "record": record,
        "names": names,
        "own": own,
        "rows": rows,
        "best": max(rows, key=lambda row: row["mean"] or 0.0),
        "worst": [
            _cell(rate, "any other row", name, False) for rate, name in zip(record.worst, names, strict=True)
        ],
        "clean": [_number(share) for share in record.clean_accuracy],
        "noise": [_number(share) for share in record.noise],
        "data": data_name(record.data["string"]),
        "attack": attack_words(record.attack),
        "facts": [(name, str(value)) for name, value in facts.items() if value not in (None, "")],
        "strings": list(zip(names, [*record.models, *record.targets], strict=True)),
        **commands(record.environment, _command(record)),
        "version": versions.get("robustkit") or "",
    }


def _cell(rate: Rate | None, row: str, column: str, same: bool) -> dict[str, Any]:
    if rate is None:
        return {
            "share": 0.0,
            "text": "–",
            "ends": "",
            "title": f"{column} classifies no image correctly",
            "same": same,
        }
    return {
        "share": round(rate.value, 3),
        "text": _number(rate.value),
        "ends": f"{100 * rate.low:.0f} – {100 * rate.high:.0f}",
        "title": f"crafted on {row}, evaluated on {column}: {_number(rate.value)} % of {rate.n} images",
        "same": same,
    }


def _mean(rates: list[Rate | None]) -> float | None:
    known = [rate.value for rate in rates if rate]
    return sum(known) / len(known) if known else None


def _number(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f}"


def _command(record: Matrix) -> str:
    words = ["robustkit matrix", f"--models '{','.join(record.models)}'"]
    words += [f"--target '{target}'" for target in record.targets]
    words += [f"--attack '{record.attack['string']}'"]
    words += [f"--data {record.data['string']}", f"--limit {record.n}"]
    words += [f"--threat {record.threat}", f"--seed {record.seed}"]
    words += [f"--targeted {record.targeted}"] if record.targeted else []
    return " \\\n    ".join(words)
