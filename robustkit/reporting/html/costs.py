"""Where the budget went: propagations and seconds of each stage, and what they bought."""

from __future__ import annotations

from dataclasses import dataclass

from robustkit.reporting.names import stage_names
from robustkit.runs.evaluation_record import Rate, Report


@dataclass(frozen=True)
class CostRow:
    """One stage, or the checks, which settle no image.

    `settled` is what it did to the images that entered: those fooled, of the clean stage those that are wrong as
    they are. `share_*` are of the whole run, `kills` are images fooled per 1000 propagations.
    """

    attack: str
    rate: Rate | None
    entering: int
    settled: str
    propagations: int
    share_propagations: float
    seconds: float
    share_seconds: float
    kills: float | None


def rows(report: Report) -> list[CostRow]:
    """Return a row per stage in the order run, the checks after the clean one, whose cost holds theirs.

    Those two share the time of the clean stage by their passes.
    """
    total = (report.cost.forwards + report.cost.backwards) or 1
    seconds, checks = report.cost.seconds or 1.0, report.checks
    found: list[CostRow] = []

    def add(
        name: str, rate: Rate | None, settled: str, spent: int, time: float, kills: float | None = None
    ) -> None:
        row = CostRow(name, rate, entering, settled, spent, spent / total, time, time / seconds, kills)
        found.append(row)

    entering = report.n
    for number, (name, stage) in enumerate(zip(stage_names(report), report.stages, strict=True)):
        spent, time, rate = stage.forwards + stage.backwards, stage.seconds, stage.robust_accuracy
        if number:
            kills = 1000 * stage.fooled / spent if spent else None
            add(name, rate, f"{stage.fooled:,}", spent, time, kills)
        elif checks is None:
            add(name, rate, f"{stage.fooled:,} wrong", spent, time)
        else:
            late = time * checks.total / spent if spent else 0.0
            add(name, rate, f"{stage.fooled:,} wrong", spent - checks.total, time - late)
            add("checks", None, "–", checks.total, late)
        # Where the nearest image is looked for, every attack gets all images that the model classifies correctly.
        entering -= 0 if report.minimum and number else stage.fooled
    return found


def fooled(report: Report) -> int:
    """Return how many images an attack fooled; those that are wrong as they are not counted."""
    return sum(stage.fooled for stage in report.stages[1:])
