"""At what size images are attacked, and what is done to them before and after: the threat is in these pixels."""

from __future__ import annotations

import statistics
from typing import Any

from robustkit.core.flags import Flag
from robustkit.data.samples import Samples
from robustkit.models.classifier import Classifier

# Of so many files the sizes are looked at, evenly spread over the data.
LOOKED_AT = 500
# Few that are smaller than the rest, as some of ImageNet's, say nothing about the number.
FEW = 0.05


def pixel_space(model: Classifier, samples: Samples) -> dict[str, Any]:
    """Return heights and widths in pixels of the images as attacked and as the net sees them.

    Of image files there are also `files`, how many were looked at, `enlarged`, how many of these were enlarged to
    be read at that size, and `times`, the median number of times that a file's side was lengthened.
    """
    attacked = list(samples.images([0]).shape[2:])
    space: dict[str, Any] = {"attacked": attacked, "net": list(model.size or attacked)}
    if times := samples.enlargements(LOOKED_AT):
        enlarged = sum(one > 1 for one in times)
        space |= {"files": len(times), "enlarged": enlarged, "times": statistics.median(times)}
    return space


def enlarged_images(space: dict[str, Any]) -> list[Flag]:
    """Return a flag if more than few image files were enlarged before the attack."""
    if not space.get("enlarged", 0) > FEW * space.get("files", 0):
        return []
    height, width = space["attacked"]
    return [
        Flag(
            "enlarged-images",
            "warning",
            round(space["times"], 3),
            f"times longer sides than in the image files (median; {space['enlarged']} of {space['files']} looked "
            f"at were enlarged to {height} x {width} pixels before the attack), so the threat is in pixels that "
            "the files do not have",
            "write ?size=N with the files' own size, or give the images as an .npz file, which is attacked as it "
            "is and enlarged inside the model",
        )
    ]
