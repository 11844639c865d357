"""The page about accuracy on corrupted images: one self-contained HTML file, made from the record."""

from __future__ import annotations

import shlex
from typing import Any

from robustkit.data.corruptions.names import NAMES, SEVERITIES
from robustkit.reporting.html.command import commands
from robustkit.reporting.html.render import render
from robustkit.reporting.names import data_name
from robustkit.reporting.terminal.corruptions import percent, rows, summary
from robustkit.reporting.terminal.transfer import short_names
from robustkit.runs.corruption_record import Corruptions

# The page in a run folder.
FILE = "corruptions.html"


def page(record: Corruptions) -> str:
    """Return the page."""
    return render("corruptions.html", _facts(record))


def _facts(record: Corruptions) -> dict[str, Any]:
    spec = record.spec
    versions = record.environment.get("versions", {})
    facts = {
        "model": spec.model["string"],
        "data": spec.data["string"],
        "device": record.environment.get("device_name") or record.environment.get("device"),
        "commit": record.environment.get("commit"),
        "versions": ", ".join(f"{name} {version}" for name, version in sorted(versions.items()) if version),
    }
    model, data = (shlex.quote(str(part["string"])) for part in (spec.model, spec.data))
    chosen = [] if tuple(spec.corruptions) == NAMES else [f"--corruptions {','.join(spec.corruptions)}"]
    if tuple(spec.severities) != SEVERITIES:
        chosen.append(f"--severities {','.join(map(str, spec.severities))}")
    words = [f"robustkit corrupt {model} --data {data} --limit {spec.data['n']} --seed {spec.seed}", *chosen]
    return {
        "record": record,
        "name": short_names([str(spec.model["string"])])[0],
        "data": data_name(spec.data["string"]),
        "summary": summary(record),
        "mean": percent(record.mean.value),
        "rows": [
            {
                "family": family,
                "name": name,
                "cells": [
                    {
                        "error": round(1 - rate.value, 3),
                        "text": percent(rate.value),
                        "ends": f"{100 * rate.low:.0f} – {100 * rate.high:.0f}",
                    }
                    for rate in rates
                ],
                "mean": percent(mean),
                "error": round(1 - mean, 3),
            }
            for family, name, rates, mean in rows(record)
        ],
        **commands(record.environment, " \\\n    ".join(words)),
        "facts": [(name, str(value)) for name, value in facts.items() if value not in (None, "")],
        "version": versions.get("robustkit") or "",
    }
