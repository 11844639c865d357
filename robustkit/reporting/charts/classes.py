"""Accuracy per class: counts, intervals, and a bar for each class."""

from __future__ import annotations

from dataclasses import dataclass

from markupsafe import Markup

from robustkit.reporting.charts import svg
from robustkit.reporting.sentences import class_name
from robustkit.runs.evaluation_record import Report
from robustkit.runs.report_parts import Rate

MAX_CLASSES = 20


@dataclass(frozen=True)
class ClassRow:
    """One class: its clean accuracy and its robust accuracy."""

    name: str
    clean: Rate
    robust: Rate

    @property
    def chart(self) -> Markup:
        """A bar: the robust share, the share fooled by attacks, and the interval of the robust share."""
        parts = [svg.bar(0, 4, 1, 12, "ghost")]
        if self.clean.value > self.robust.value:
            parts.append(svg.bar(self.robust.value, 4, self.clean.value - self.robust.value, 12, "fooled"))
        if self.robust.value > 0:
            parts.append(svg.bar(0, 4, self.robust.value, 12, "robust"))
        parts.append(svg.whisker(self.robust.low, self.robust.high, 10))
        return svg.drawing(parts, 20, f"{self.name}: {100 * self.robust.value:.1f} % robust")


def rows(report: Report, names: list[str]) -> tuple[list[ClassRow], int]:
    """Return the classes in order, or the 20 least robust if there are more, and the number of classes."""
    counts: dict[int, list[int]] = {}
    for image in report.verdicts:
        count = counts.setdefault(image.label, [0, 0, 0])
        count[0] += 1
        count[1] += image.attack != "clean"
        count[2] += image.robust
    chosen = sorted(counts)
    if len(chosen) > MAX_CLASSES:
        # The upper end of the interval ranks two classes without a robust image by their number of images.
        chosen = sorted(chosen, key=lambda label: (Rate.of(counts[label][2], counts[label][0]).high, label))[
            :MAX_CLASSES
        ]
    return [
        ClassRow(class_name(names, label), Rate.of(clean, n), Rate.of(robust, n))
        for label, (n, clean, robust) in ((label, counts[label]) for label in chosen)
    ], len(counts)
