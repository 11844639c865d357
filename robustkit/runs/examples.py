"""The images that a page about the run shows: the distances of all fooled ones, and a few examples.

The arrays of `examples.npz`: `index`, `distance` and `prediction` of every image that was fooled, or crafted (M);
`shown`, the positions of the examples (S), `hard`, whether they are among the hardest (S), `clean` and
`adversarial` (S C H W), no side above 96 pixels; `shape` (3), the true C H W; `classes`, the names of the
classes, empty if the data knows none.
"""

from __future__ import annotations

import itertools

import numpy as np
import torch
from torch.nn import functional

from robustkit.core.shapes import Images
from robustkit.core.threat import ThreatModel
from robustkit.data.samples import Samples
from robustkit.runs.run_folder import Adversarials

EXTREMES_SHOWN, CRAFTED_SHOWN = 8, 12
LARGEST_SIDE = 96
BATCH_SIZE = 256


def choose(index: np.ndarray, fooled_at: np.ndarray, margins: np.ndarray) -> tuple[list[int], list[int]]:
    """Return the positions of the hardest and the easiest of the fooled images `index`; none is in both.

    The hardest were fooled by the latest stage, with the smallest margin; the easiest by the earliest, with the
    largest. `fooled_at` (the stage that fooled each image) and `margins` are of all images.
    """
    order = index[np.lexsort((index, np.abs(margins[index]), -fooled_at[index]))].tolist()
    hardest = order[: min(EXTREMES_SHOWN, (len(order) + 1) // 2)]
    easiest = order[len(hardest) :][::-1][:EXTREMES_SHOWN]
    return hardest, easiest


def evenly_spaced(n: int) -> list[int]:
    """Return the positions of some of n images, evenly from the first to the last."""
    return sorted(set(np.linspace(0, n - 1, CRAFTED_SHOWN).round().astype(int).tolist()))


def arrays(
    rows: Adversarials,
    predictions: np.ndarray,
    chosen: tuple[list[int], list[int]],
    samples: Samples,
    threat: ThreatModel,
) -> dict[str, np.ndarray]:
    """Return the arrays of examples.npz; `predictions` are the model's predictions on the fooling images."""
    hardest, easiest = chosen
    shown = [*hardest, *easiest]
    distances = [np.zeros(0)]
    pairs: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    found = rows.images()
    for begin in range(0, len(rows.index), BATCH_SIZE):
        part = rows.index[begin : begin + BATCH_SIZE]
        clean = samples.images(part)
        flat = np.frombuffer(b"".join(itertools.islice(found, len(part))), np.float32)
        adversarial = torch.from_numpy(flat.reshape(clean.shape).copy())
        distances.append(threat.distance(adversarial, clean).numpy())
        for row in np.flatnonzero(np.isin(part, shown)).tolist():
            # A view of a row would keep its whole block in memory.
            pairs[int(part[row])] = clean[row].clone(), adversarial[row].clone()
    return {
        "index": rows.index,
        "distance": np.concatenate(distances),
        "prediction": predictions,
        "shown": np.array(shown, np.int64),
        "hard": np.arange(len(shown)) < len(hardest),
        "clean": _thumbnails([pairs[position][0] for position in shown], rows.shape),
        "adversarial": _thumbnails([pairs[position][1] for position in shown], rows.shape),
        "shape": np.array(rows.shape, np.int64),
        "classes": np.array(samples.classes or [], np.str_),
    }


def _thumbnails(images: list[torch.Tensor], shape: tuple[int, ...]) -> np.ndarray:
    """Return the images as one array, averaged down if they are large."""
    x: Images = torch.stack(images) if images else torch.zeros(0, *shape)
    height, width = shape[1:]
    scale = LARGEST_SIDE / max(height, width)
    if scale < 1:
        size = max(1, round(scale * height)), max(1, round(scale * width))
        x = functional.adaptive_avg_pool2d(x, size) if images else torch.zeros(0, shape[0], *size)
    return x.numpy()
