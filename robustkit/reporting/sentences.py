"""Sentences about an evaluation: its model, data, threat and verdict."""

from __future__ import annotations

import math
import re

from robustkit.core.errors import printable
from robustkit.reporting.terminal.evaluation import percent
from robustkit.runs.evaluation_record import Report


def model_name(report: Report) -> str:
    """Return the model string without folders; of its query only the defense, which changes the model.

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
    """Return what the attacker may change, as the second half of a sentence."""
    norm, _, eps = report.spec.threat.partition(":")
    if report.spec.minimal:
        return f"the smallest perturbation is searched for ({distance_unit(report)})"
    return {
        "linf": f"no pixel value changes by more than {eps} (largest absolute change)",
        "l2": f"the perturbation has a Euclidean length of at most {eps}",
        "l1": f"the absolute changes of all pixel values add up to at most {eps}",
    }.get(norm, f"the perturbation is at most {eps} in {norm}")


def eps(report: Report) -> float:
    """Return the threat's size as a number; infinite where it has none."""
    if report.spec.minimal:
        return math.inf
    numerator, _, denominator = report.spec.threat.partition(":")[2].partition("/")
    return float(numerator) / float(denominator or 1)


def distance_unit(report: Report) -> str:
    """Return what a distance in the threat's norm measures."""
    norm = report.spec.threat.partition(":")[0]
    return {
        "linf": "largest change of a pixel value",
        "l2": "Euclidean length of the change",
        "l1": "sum of the absolute changes",
    }.get(norm, norm)


def verdict(report: Report) -> str:
    """Return the result as a sentence with counts."""
    if report.minimum:
        distances = report.minimum.right
        found = sum(map(math.isfinite, distances))
        correct = counted(len(distances))
        return f"An adversarial image was found for {found:,} of {correct} that are classified correctly."
    if report.n == 1:
        image = report.verdicts[0]
        if image.robust:
            return "The one image stays correctly classified under every attack of this run."
        clean = image.attack == "clean"
        return f"The one image is {'misclassified without an attack' if clean else f'fooled by {image.attack}'}."
    robust = sum(image.robust for image in report.verdicts)
    verb = "stays" if robust == 1 else "stay"
    return f"{robust:,} of {images(report)} {verb} correctly classified under every attack of this run."


def interval(low: float, high: float) -> str:
    """Return `95 % interval 20.3 – 35.7 %`."""
    return f"95 % interval {100 * low:.1f} – {percent(high)}"


def trust(report: Report) -> str:
    """Return whether the number can be trusted, by the flags that were raised."""
    counts = {level: sum(flag.level == level for flag in report.flags) for level in ("error", "warning", "info")}
    named = [
        f"{count} {word}{'s' * (count > 1)}"
        for count, word in zip(counts.values(), ("error", "warning", "note"), strict=True)
        if count
    ]
    flags = ", ".join(named)
    if counts["error"]:
        return f"Do not quote this number: the checks raised {flags}."
    if counts["warning"]:
        return f"Read the flags before quoting this number: the checks raised {flags}."
    if counts["info"]:
        return f"The checks raised no warning, {flags}."
    return "The checks raised no flag."


def class_name(classes: list[str], label: int) -> str:
    """Return a class's name, or its number if the data has no names."""
    return classes[label] if 0 <= label < len(classes) else f"class {label}"


def _without_folders(text: str) -> str:
    return printable(re.sub(r"(^|[@:])[^@:?]*/(?=[^/#])", r"\1", text))
