"""The page about the diversity of an ensemble: one self-contained HTML file, made from the record."""

from __future__ import annotations

import shlex
from typing import Any

from robustkit.reporting.html.command import commands
from robustkit.reporting.html.render import render
from robustkit.reporting.names import data_name
from robustkit.reporting.terminal.diversity import BOUNDS, bounds_rows, heads, number, verdict
from robustkit.reporting.terminal.transfer import short_names
from robustkit.runs.diversity_record import Diversity
from robustkit.runs.report_parts import Rate

# The page in a run folder.
FILE = "diversity.html"


def page(record: Diversity) -> str:
    """Return the page."""
    return render("diversity.html", _facts(record))


def _facts(record: Diversity) -> dict[str, Any]:
    spec, names = record.spec, heads(record)
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
        "versions": ", ".join(f"{name} {version}" for name, version in sorted(versions.items()) if version),
    }
    model, data, threat = map(shlex.quote, map(str, (spec.model["string"], spec.data["string"], spec.threat)))
    return {
        "record": record,
        "name": short_names([str(spec.model["string"])])[0],
        "data": data_name(spec.data["string"]),
        "verdict": verdict(record),
        "heads": names,
        "transfer": [
            {
                "name": names[member],
                "cells": [{**_cell(rate), "same": column == member} for column, rate in enumerate(row)],
            }
            for member, row in enumerate(record.transfer)
        ]
        + [{"name": "any other", "cells": [{**_cell(rate), "same": False} for rate in record.worst]}],
        "bound_heads": list(BOUNDS.values()),
        "bounds": [
            {"name": name, "cells": [_cell(getattr(bounds, key)) for key in BOUNDS]}
            for name, bounds in bounds_rows(record)
        ],
        "seen": [
            {"name": names[member], "cells": [f"{value:.2f}" for value in (*distance, *cosine)]}
            for member, (distance, cosine) in enumerate(zip(record.diversity, record.cosine, strict=True))
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


def _cell(rate: Rate) -> dict[str, Any]:
    return {
        "share": round(rate.value, 3),
        "text": number(rate),
        "ends": f"{100 * rate.low:.0f} – {100 * rate.high:.0f}",
    }
