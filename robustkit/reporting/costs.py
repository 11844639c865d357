"""What each stage of an evaluation cost in passes and seconds, and how many images it fooled."""

from __future__ import annotations

from dataclasses import dataclass

from robustkit.reporting.names import stage_names
from robustkit.runs.evaluation_record import Report
from robustkit.runs.report_parts import Rate


@dataclass(frozen=True)
class CostRow:
    """One stage, or the checks, which fool no image.

    Attributes:
        attack: the stage's name.
        rate: robust accuracy after the stage; None for the checks.
        entering: number of images that the stage was given.
        fooled: number of images fooled, as text; for the clean stage the number that is misclassified.
        passes: forward and backward passes, one for each image.
        share_passes: share of the passes of the whole run.
        seconds: wall-clock time.
        share_seconds: share of the time of the whole run.
        fooled_per_1000: images fooled per 1,000 passes; None where that has no meaning.
    """

    attack: str
    rate: Rate | None
    entering: int
    fooled: str
    passes: int
    share_passes: float
    seconds: float
    share_seconds: float
    fooled_per_1000: float | None


def rows(report: Report) -> list[CostRow]:
    """Return a row per stage in order, and a row for the checks after the clean stage.

    The record counts the checks as part of the clean stage; its time is divided between the two by their passes.
    """
    total = (report.cost.forwards + report.cost.backwards) or 1
    seconds, checks = report.cost.seconds or 1.0, report.checks
    rows: list[CostRow] = []

    def add(
        name: str, rate: Rate | None, fooled: str, spent: int, time: float, per_1000: float | None = None
    ) -> None:
        row = CostRow(name, rate, entering, fooled, spent, spent / total, time, time / seconds, per_1000)
        rows.append(row)

    entering = report.n
    for number, (name, stage) in enumerate(zip(stage_names(report), report.stages, strict=True)):
        spent, time, rate = stage.forwards + stage.backwards, stage.seconds, stage.robust_accuracy
        if number:
            per_1000 = 1000 * stage.fooled / spent if spent else None
            add(name, rate, f"{stage.fooled:,}", spent, time, per_1000)
        elif checks is None:
            add(name, rate, f"{stage.fooled:,} wrong", spent, time)
        else:
            checks_time = time * checks.total / spent if spent else 0.0
            add(name, rate, f"{stage.fooled:,} wrong", spent - checks.total, time - checks_time)
            add("checks", None, "–", checks.total, checks_time)
        # In a search for minimum norms every attack gets all images that the model classifies correctly.
        entering -= 0 if report.minimum and number else stage.fooled
    return rows


def fooled(report: Report) -> int:
    """Return the number of images that an attack fooled, without those misclassified without an attack."""
    return sum(stage.fooled for stage in report.stages[1:])
