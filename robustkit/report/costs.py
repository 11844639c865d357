"""Where the budget went: propagations and seconds of each stage, and what they bought."""

from __future__ import annotations

from dataclasses import dataclass

from robustkit.record import Report
from robustkit.report.names import stage_names


@dataclass(frozen=True)
class CostRow:
    """One stage; `share_*` are of the whole run, `kills` are images fooled per 1000 propagations."""

    attack: str
    entering: int
    fooled: int
    propagations: int
    share_propagations: float
    seconds: float
    share_seconds: float
    kills: float | None


def rows(report: Report) -> list[CostRow]:
    """Return a row per stage, in the order run."""
    total = (report.cost.forwards + report.cost.backwards) or 1
    seconds = report.cost.seconds or 1.0
    found, entering = [], report.n
    for number, (name, stage) in enumerate(zip(stage_names(report), report.stages, strict=True)):
        spent = stage.forwards + stage.backwards
        found.append(
            CostRow(
                name,
                entering,
                stage.fooled,
                spent,
                spent / total,
                stage.seconds,
                stage.seconds / seconds,
                1000 * stage.fooled / spent if spent and number else None,
            )
        )
        entering -= stage.fooled
    return found
