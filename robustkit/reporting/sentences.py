"""A run in words: its model, its data, its threat, its verdict."""

from __future__ import annotations

import math
import re

from robustkit.core.errors import printable
from robustkit.reporting.terminal.evaluation import percent
from robustkit.runs.evaluation_record import Report


def model_name(report: Report) -> str:
    """Return the model string without folders, and of its query the defense alone, which makes it another model.

    `robustkit:cifar-resnet20@at.safetensors`, `robustkit:digits-cnn?defense=jpeg:75`.
    """
    string = str(report.spec.model["string"])
    defense = re.search(r"[?&](defense=[^&]+)", string)
    return _without_folders(string.partition("?")[0]) + (f"?{defense[1]}" if defense else "")


def data_name(report: Report) -> str:
    """Return the data string without its folders."""
    return _without_folders(str(report.spec.data["string"]).partition("?")[0])


def images(report: Report) -> str:
    """Return `1 image` or `10,000 images`."""
    return counted(report.n)


def counted(n: int) -> str:
    """Return `1 image` or `10,000 images`."""
    return f"{n:,} image{'s' * (n != 1)}"


def threat(report: Report) -> str:
    """Return what the attacker may do, as the second half of a sentence."""
    norm, _, eps = report.spec.threat.partition(":")
    if report.spec.minimal:
        return f"the image moves as little as it can ({distance_unit(report)})"
    return {
        "linf": f"no pixel value moves by more than {eps} (largest absolute change)",
        "l2": f"the image moves by at most {eps} in Euclidean length",
        "l1": f"the absolute changes of all pixel values add up to at most {eps}",
    }.get(norm, f"the image moves by at most {eps} in {norm}")


def eps(report: Report) -> float:
    """Return the threat's size as a number; infinite where it has none."""
    if report.spec.minimal:
        return math.inf
    numerator, _, denominator = report.spec.threat.partition(":")[2].partition("/")
    return float(numerator) / float(denominator or 1)


def distance_unit(report: Report) -> str:
    """Return what a distance in the threat's norm counts."""
    norm = report.spec.threat.partition(":")[0]
    return {
        "linf": "largest change of a pixel value",
        "l2": "Euclidean length of the change",
        "l1": "sum of the absolute changes",
    }.get(norm, norm)


def verdict(report: Report) -> str:
    """Return the sentence that the number stands in, without the number."""
    if report.minimum:
        right = report.minimum.right
        found = sum(math.isfinite(far) for far in right)
        return (
            f"An adversarial image was found for {found:,} of {counted(len(right))} that are classified correctly."
        )
    if report.n == 1:
        image = report.verdicts[0]
        if image.robust:
            return "The one image stays correctly classified under every attack of this run."
        fell = "is wrong as it is" if image.attack == "clean" else f"falls to {image.attack}"
        return f"The one image {fell}."
    stood = sum(image.robust for image in report.verdicts)
    stay = "stays" if stood == 1 else "stay"
    return f"{stood:,} of {images(report)} {stay} correctly classified under every attack of this run."


def interval(low: float, high: float) -> str:
    """Return `95 % interval 20.3 – 35.7 %`."""
    return f"95 % interval {100 * low:.1f} – {percent(high)}"


def trust(report: Report) -> str:
    """Return how far the checks let the number be trusted."""
    counts = {level: sum(flag.level == level for flag in report.flags) for level in ("error", "warning", "info")}
    named = [
        f"{count} {word}{'s' * (count > 1)}"
        for count, word in zip(counts.values(), ("error", "warning", "note"), strict=True)
        if count
    ]
    said = ", ".join(named)
    if counts["error"]:
        return f"Do not quote this number: the checks raised {said}."
    if counts["warning"]:
        return f"Look before quoting this number: the checks raised {said}."
    if counts["info"]:
        return f"The checks raised no warning, {said}."
    return "The checks raised no flag."


def class_name(classes: list[str], label: int) -> str:
    """Return a class's name, or its number where the data names none."""
    return classes[label] if 0 <= label < len(classes) else f"class {label}"


def _without_folders(text: str) -> str:
    return printable(re.sub(r"(^|[@:])[^@:?]*/(?=[^/#])", r"\1", text))
