"""Accuracy per class: counts, intervals, and a bar for each."""

from __future__ import annotations

from dataclasses import dataclass

from markupsafe import Markup

from robustkit.reporting.charts import svg
from robustkit.reporting.sentences import class_name
from robustkit.runs.evaluation_record import Rate, Report

MOST = 20


@dataclass(frozen=True)
class ClassRow:
    """One class: how many images, how many right as they are, how many after all attacks."""

    name: str
    clean: Rate
    robust: Rate

    @property
    def chart(self) -> Markup:
        """The robust share over the clean share, with the robust share's interval."""
        parts = [svg.bar(0, 4, 1, 12, "ghost")]
        if self.clean.value > self.robust.value:
            parts.append(svg.bar(self.robust.value, 4, self.clean.value - self.robust.value, 12, "fell"))
        if self.robust.value > 0:
            parts.append(svg.bar(0, 4, self.robust.value, 12, "stood"))
        parts.append(svg.whisker(self.robust.low, self.robust.high, 10))
        return svg.drawing(parts, 20, f"{self.name}: {100 * self.robust.value:.1f} % robust")


def rows(report: Report, names: list[str]) -> tuple[list[ClassRow], int]:
    """Return the classes in order, or the worst 20 where there are more; and how many there are."""
    counts: dict[int, list[int]] = {}
    for image in report.verdicts:
        count = counts.setdefault(image.label, [0, 0, 0])
        count[0] += 1
        count[1] += image.attack != "clean"
        count[2] += image.robust
    chosen = sorted(counts)
    if len(chosen) > MOST:
        # Of two classes with nothing left, the one that says so with more images is the worse.
        chosen = sorted(chosen, key=lambda label: (Rate.of(counts[label][2], counts[label][0]).high, label))[:MOST]
    return [
        ClassRow(class_name(names, label), Rate.of(clean, n), Rate.of(robust, n))
        for label, (n, clean, robust) in ((label, counts[label]) for label in chosen)
    ], len(counts)
