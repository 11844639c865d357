"""Images as 8-bit files that are still inside the ball: rounded to grey levels, then bounded in whole levels.

Rounding 255 x can add half a level to every pixel, and truncating, as is often done, up to a whole one. Here the
change is counted in levels, from the clean image's own: in linf each is at most floor(255 eps + 1e-6), in l2 the
sum of squares is at most (255 eps)^2, in l1 the sum is at most 255 eps, both as exact fractions. Where a clean
image lies between levels, in linf each pixel is within eps of the image itself, if eps is half a level or more.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image

from robustkit.core.errors import RunError, UsageError
from robustkit.core.threat import ThreatModel
from robustkit.core.writing import remove_drafts, write

LEVELS = 255
# The distance, in levels, up to which a float32 value counts as a level.
LEVEL_TOLERANCE = 1e-3
LABELS = "labels.csv"


def levels(images: np.ndarray) -> np.ndarray:
    """Return images on [0, 1] as the nearest grey levels, int64."""
    return np.rint(images.astype(np.float64) * LEVELS).astype(np.int64)


def allowance(threat: ThreatModel) -> int:
    """Return the bound of a change in levels: the largest in linf, the sum of squares in l2, the sum in l1."""
    eps = Fraction(threat.eps)
    if threat.norm == "linf":
        return math.floor(LEVELS * eps + Fraction(1, 10**6))
    return math.floor((LEVELS * eps) ** (2 if threat.norm == "l2" else 1))


def measure(change: np.ndarray, norm: str) -> np.ndarray:
    """Return the size of each row's change in levels (N C H W), to compare with `allowance`."""
    rows = np.abs(change.reshape(len(change), -1))
    whole: np.ndarray = {"linf": rows.max(1), "l2": np.square(rows).sum(1), "l1": rows.sum(1)}[norm]
    return whole


def quantized(adversarial: np.ndarray, clean: np.ndarray, threat: ThreatModel) -> np.ndarray:
    """Return images (N C H W) as levels, uint8, whose change from the clean levels is within the allowance.

    In l2 and l1 the coordinates that rounding increased are reduced by a level, the largest first, until the
    change is within the allowance.
    """
    base, most = levels(clean), allowance(threat)
    exact = adversarial.astype(np.float64) * LEVELS - base
    change = levels(adversarial) - base
    if threat.norm == "linf":
        middle = clean.astype(np.float64) * LEVELS
        middle, reach = (
            np.where(np.abs(middle - base) < LEVEL_TOLERANCE, base, middle),
            float(LEVELS * threat.eps) + 1e-6,
        )
        low = np.maximum(np.ceil(middle - reach) - base, -most)
        high = np.minimum(np.floor(middle + reach) - base, most)
        change = np.clip(change, np.minimum(low, 0), np.maximum(high, 0)).astype(np.int64)
    else:
        flat, wanted = change.reshape(len(change), -1), np.abs(exact).reshape(len(change), -1)
        while len(rows := np.flatnonzero(measure(change, threat.norm) > most)):
            size = np.abs(flat[rows])
            gain = np.where(size > 0, 2 * size - 1 if threat.norm == "l2" else 1, 0)
            order = np.argsort(np.where(size > 0, wanted[rows] - size, np.inf), axis=1, kind="stable")
            saved = np.take_along_axis(gain, order, 1).cumsum(1)
            over = measure(change[rows], threat.norm) - most
            back = np.zeros_like(size)
            # Up to the first coordinate with which the change is within the allowance, or all.
            np.put_along_axis(back, order, ((saved - np.take_along_axis(gain, order, 1)) < over[:, None]) * 1, 1)
            flat[rows] -= np.sign(flat[rows]) * back
    whole: np.ndarray = (base + change).astype(np.uint8)
    return whole


@dataclass(frozen=True)
class PngImages:
    """The PNG files of a folder, indexed by number like an array (N C H W) of float32 in [0, 1]."""

    folder: Path

    def __getitem__(self, positions: np.ndarray) -> np.ndarray:
        pixels = [_read(self.folder / _name(index)) for index in positions.tolist()]
        written: np.ndarray = np.stack(pixels).astype(np.float32) / np.float32(LEVELS)
        return written


def save(
    folder: Path,
    blocks: Iterable[tuple[np.ndarray, np.ndarray]],
    labels: Sequence[int],
    threat: ThreatModel,
) -> tuple[PngImages, int]:
    """Write PNG files and labels.csv into a folder, and read them again.

    Args:
        folder: where the files are written.
        blocks: adversarial images with the clean ones (B C H W), in order.
        labels: the class of each.
        threat: the threat that changes must stay within.

    Returns:
        The files, and the largest change of a pixel in levels.

    Raises:
        UsageError: for images that are neither grey nor of three colours, or a folder that cannot be used.
        RunError: if a file does not read back as it was written, or is outside the threat.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        own = {LABELS, *(_name(index) for index in range(len(labels)))}
        remove_drafts(folder)
        foreign = [file.name for file in folder.iterdir() if file.name not in own]
    except OSError as error:
        raise UsageError(
            f"cannot write {folder}: {error.strerror or error}; choose another --png folder."
        ) from error
    if foreign:
        raise UsageError(f"{folder} holds {sorted(foreign)[0]!r}; give --png an empty or new folder.")
    table = io.StringIO()
    rows = csv.writer(table, lineterminator="\n")
    rows.writerow(["file", "index", "label"])
    index, largest = 0, 0
    for adversarial, clean in blocks:
        if clean.shape[1] not in (1, 3):
            raise UsageError(f"images of {clean.shape[1]} channels are no PNG files; leave --png out.")
        whole = quantized(adversarial, clean, threat)
        again = np.empty_like(whole)
        for row, image in enumerate(whole):
            name = _name(index)
            packed = io.BytesIO()
            Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0)).save(packed, "png")
            write(folder / name, packed.getvalue())
            again[row] = _read(folder / name)
            rows.writerow([name, index, labels[index]])
            index += 1
        change = again.astype(np.int64) - levels(clean)
        if (again != whole).any() or (measure(change, threat.norm) > allowance(threat)).any():
            raise RunError(f"the files in {folder} do not read back within {threat}; is the disk damaged?")
        largest = max(largest, int(np.abs(change).max()))
    write(folder / LABELS, table.getvalue().encode())
    return PngImages(folder), largest


def _name(index: int) -> str:
    return f"{index:06d}.png"


def _read(file: Path) -> np.ndarray:
    """Return a file's pixels, uint8 (C H W)."""
    with Image.open(file, formats=("PNG",)) as image:
        pixels = np.asarray(image)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
