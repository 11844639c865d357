"""`robustkit doctor --aggregator`: properties of a way to combine predictors, as numbers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

from robustkit.api.options.runs import DoctorFlags
from robustkit.cli.streams import print_result
from robustkit.core.errors import UsageError
from robustkit.models.ensembles.aggregator_factsheet import FactSheet, fact_sheet
from robustkit.reporting.terminal.evaluation import percent


def show(flags: DoctorFlags, given: Sequence[str]) -> int:
    """Print the fact sheet; return the exit code. `given` are the names of options that do not apply to it."""
    if given:
        raise UsageError(f"{given[0]} with --aggregator: a fact sheet is of no model; leave one of them out.")
    sheet = fact_sheet(str(flags.aggregator), flags.predictors, flags.classes)
    print_result(json.dumps(asdict(sheet), indent=2) if flags.json else "\n".join(lines(sheet)))
    return 0


def lines(sheet: FactSheet) -> list[str]:
    """Return the sheet as text."""
    rows = {
        "output unchanged by": ", ".join(name for name, stays in sheet.invariances.items() if stays) or "none",
        "output changed by": ", ".join(name for name, stays in sheet.invariances.items() if not stays) or "none",
        "no gradient": f"{percent(sheet.plateau)} of the winning classes' scores",
        "ties": f"{percent(sheet.ties)} of the draws; the lower class number wins",
        "no first choice": f"{percent(sheet.unpredicted)} of the winning classes",
        "gradient": f"at most {sheet.partials} of {sheet.predictors * sheet.classes} logits",
        "attack ties with": _count(sheet.predictors_to_tie, sheet.predictors),
        "attack wins with": _count(sheet.predictors_to_win, sheet.predictors),
    }
    sizes = f"{sheet.predictors} predictors, {sheet.classes} classes; {sheet.draws:,} random logits"
    head = f"{sheet.aggregator} of {sizes}"
    return [head, "", *(f"{name:<21}{text}" for name, text in rows.items())]


def _count(number: int | None, predictors: int) -> str:
    """Return in words how many predictors an attacker needs."""
    return "all predictors taken over" if number is None else f"{number} of {predictors} predictors taken over"
