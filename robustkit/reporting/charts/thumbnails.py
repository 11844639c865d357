"""Thumbnails: clean image, adversarial image, and their difference times a factor, as PNGs inside the page."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from PIL import Image

from robustkit.reporting.sentences import class_name
from robustkit.runs.evaluation_record import Report

SIDE = 96


@dataclass(frozen=True)
class Pictures:
    """Clean image, perturbed image, and their difference times a factor around grey, as data URIs."""

    clean: str
    changed: str
    difference: str
    factor: str


@dataclass(frozen=True)
class Example:
    """One fooled image: its pictures and its caption."""

    pictures: Pictures
    index: int
    label: str
    prediction: str
    attack: str
    margin: float
    distance: float
    hard: bool


def strip(report: Report, examples: Mapping[str, np.ndarray]) -> list[Example]:
    """Return the stored example images, the hardest to fool first."""
    names = examples["classes"].tolist()
    rows = {int(index): row for row, index in enumerate(examples["index"])}
    verdicts = {verdict.index: verdict for verdict in report.verdicts}
    shown_images = []
    for (position, pictures), hard in zip(shown(examples), examples["hard"].tolist(), strict=True):
        image = verdicts[position]
        shown_images.append(
            Example(
                pictures=pictures,
                index=position,
                label=class_name(names, image.label),
                prediction=class_name(names, int(examples["prediction"][rows[position]])),
                attack=str(image.attack),
                margin=image.margin,
                distance=float(examples["distance"][rows[position]]),
                hard=hard,
            )
        )
    return shown_images


def shown(examples: Mapping[str, np.ndarray]) -> Iterator[tuple[int, Pictures]]:
    """Yield the position and the pictures of each image to show."""
    pairs = zip(examples["shown"].tolist(), examples["clean"], examples["adversarial"], strict=True)
    for position, clean, changed in pairs:
        change = changed - clean
        factor = enlargement(float(np.abs(change).max()))
        yield position, Pictures(picture(clean), picture(changed), picture(0.5 + factor * change), f"{factor:,g}")


def scaled(examples: Mapping[str, np.ndarray]) -> bool:
    """Return whether the example images were scaled down."""
    return tuple(examples["shape"]) != examples["clean"].shape[1:]


def enlargement(largest: float) -> float:
    """Return the factor of two digits that scales the largest change to at most half the range."""
    if largest <= 0:
        return 1.0
    factor = 0.5 / largest
    unit = 10.0 ** (math.floor(math.log10(factor)) - 1)
    return float(f"{math.floor(factor / unit * (1 + 1e-9)) * unit:.6g}")


def picture(image: np.ndarray) -> str:
    """Return an image (C H W) on [0, 1] as a data URI; small ones are enlarged pixel by pixel.

    Other than one or three channels are averaged to grey.
    """
    if len(image) not in (1, 3):
        image = image.mean(0, keepdims=True)
    levels = np.rint(255 * image.clip(0, 1)).astype(np.uint8)
    drawn = Image.fromarray(levels[0] if len(levels) == 1 else np.ascontiguousarray(levels.transpose(1, 2, 0)))
    times = max(1, SIDE // max(drawn.size))
    drawn = drawn.resize((drawn.width * times, drawn.height * times), Image.Resampling.NEAREST)
    file = io.BytesIO()
    drawn.save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
