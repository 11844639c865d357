"""The size at which images are attacked, whose pixels the threat is in, and how files and net differ from it."""

from __future__ import annotations

import statistics
from typing import Any

from robustkit.core.flags import Flag
from robustkit.data.samples import Samples
from robustkit.models.classifier import Classifier

# The most files whose sizes are read, evenly spread over the data.
MAX_FILES_READ = 500
# The largest share of enlarged files without a flag: ImageNet has a few small ones.
MAX_ENLARGED_SHARE = 0.05


def pixel_space(model: Classifier, samples: Samples) -> dict[str, Any]:
    """Return heights and widths in pixels of the images as attacked and as the net sees them.

    For image files also `files`, how many were read, `enlarged`, how many of these were enlarged to that size, and
    `times`, the median factor by which a file's side grew.
    """
    attacked = list(samples.images([0]).shape[2:])
    space: dict[str, Any] = {"attacked": attacked, "net": list(model.size or attacked)}
    if times := samples.enlargements(MAX_FILES_READ):
        enlarged = sum(one > 1 for one in times)
        space |= {"files": len(times), "enlarged": enlarged, "times": statistics.median(times)}
    return space


def enlarged_images(space: dict[str, Any]) -> list[Flag]:
    """Return a flag if more than `MAX_ENLARGED_SHARE` of the image files were enlarged before the attack."""
    if not space.get("enlarged", 0) > MAX_ENLARGED_SHARE * space.get("files", 0):
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
