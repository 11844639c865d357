"""Whether a model is better than guessing: if not, labels, normalisation or pixel range are wrong. No torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from robustkit.core.flags import Flag
from robustkit.runs.evaluation_record import CHANCE
from robustkit.runs.report_parts import Rate


def chance_accuracy(correct: int, labels: Sequence[int], classes: int, model: str = "") -> Flag | None:
    """Return a flag if a clean accuracy is not significantly above chance, or every image is misclassified.

    Chance is one class in K, or the share of the most frequent of several labels if that is significantly larger.

    Args:
        correct: images that the model classifies correctly.
        labels: of all images (N).
        classes: K.
        model: the model's name in the message, if there are several.
    """
    n = len(labels)
    if n == 0 or correct == n:
        return None
    rate = Rate.of(correct, n)
    most = max(Counter(labels).values())
    # If all images are of one class, the share of that label is no chance level.
    chance = 1 / classes if most == n else max(1 / classes, Rate.of(most, n).low)
    if correct and rate.low > chance:
        return None
    suffix = f" of {model}" if model else ""
    problem = (
        f"not significantly above chance ({classes} classes, the most frequent label on {most} images)"
        if correct
        else "every image is misclassified"
    )
    return Flag(
        CHANCE,
        "warning",
        round(rate.value, 4),
        f"is the clean accuracy{suffix} on {n} images: {problem}",
        "check that the labels are the model's class numbers (order of class folders, ?classes=FILE after the "
        "data), the normalisation (?mean=R,G,B&std=R,G,B after the model) and that pixels are on [0, 1]",
    )
