"""The command that reproduces a run."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from robustkit.registry.decorators import ORIGIN
from robustkit.reporting.names import written
from robustkit.runs.evaluation_record import Report


def command(report: Report) -> str:
    """Return the shell command of a run; the Python call if model or data were given from Python."""
    spec, data = report.spec, str(report.spec.data["string"])
    model, attacks = str(spec.model["string"]), suite(spec.suite)
    precision = report.environment.get("precision", "fp32")
    if model.startswith("python:") or data.startswith("python:"):
        words = [f'evaluate(model, images, labels, "{spec.threat}"', f'suite="{attacks}"', f"seed={spec.seed}"]
        words += [f"batch_size={spec.batch_size}"] * (spec.batch_size is not None)
        words += [f'precision="{precision}"']
        words += [f"strictness={spec.strictness!r}"] * (spec.strictness is not None)
        words += ["curve=True"] * (report.curve is not None)
        return ", ".join(words) + ")"
    words = [
        "robustkit",
        spec.verb,
        model,
        "--data",
        data,
        "--limit",
        str(spec.data["n"]),
        "--threat",
        spec.threat,
    ]
    words += ["--suite", attacks, "--seed", str(spec.seed)]
    words += ["--batch-size", str(spec.batch_size)] * (spec.batch_size is not None)
    words += ["--precision", precision]
    words += ["--strictness", repr(spec.strictness)] * (spec.strictness is not None)
    words += ["--curve"] * (report.curve is not None)
    return shlex.join(words)


def commands(environment: Mapping[str, Any], expanded: str) -> dict[str, str]:
    """Return the commands of a page: as typed and, to unfold, with every field; or the second alone."""
    try:
        words = shlex.split(str(environment.get("command") or ""))
    except ValueError:
        words = []
    # A record may come from another user: only a quoted robustkit command may be offered for pasting into a shell.
    given = shlex.join(words) if words[:1] == ["robustkit"] else ""
    return {"command": given or expanded, "expanded": expanded if given else ""}


def suite(records: Sequence[Mapping[str, Any]]) -> str:
    """Return a spec's attacks with all their fields, as `--suite` reads them."""
    return ",".join(_call(record) for record in records)


def field(record: Mapping[str, Any], name: str) -> str:
    """Return a field's value; a small step size with its unit, because `--suite` refuses it without."""
    value = record[name]
    short = name == "step_size" and isinstance(value, float) and value * record.get("steps", 1) < 1
    return f"{value!r}eps" if short else written(value)


def _call(record: Mapping[str, Any]) -> str:
    fields = [f"{k}={field(record, k)}" for k in record if k not in ("name", "view", "spare", "arm", *ORIGIN)]
    name = record.get("string", record["name"])
    call = f"{name}({','.join(fields)})" if fields else str(name)
    mark = "?" if record.get("spare") else "*" if record.get("arm") else ""
    return call + (f"@{record['view']}" if record.get("view") else "") + mark
