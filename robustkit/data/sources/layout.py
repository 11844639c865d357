"""Where the channels of an array of images stand. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence

from robustkit.core.errors import UsageError, did_you_mean

LAYOUTS = ("NCHW", "NHWC")
# Channel counts that are taken at their word, however small the image.
_MAX_CHANNELS = 4
# Sides that are no channels, where another axis is as long as grey or colour images' channels are.
_LEAST_SIDE = 8


def channels_last(shape: Sequence[int], layout: str | None, assumed: bool, what: str, advice: str) -> bool:
    """Return whether the channels of images stand last.

    Args:
        shape: of the array, four axes.
        layout: `NCHW` or `NHWC`, if somebody has said which.
        assumed: what is taken for true otherwise, if the shape does not speak against it. Three channels at the
            other end, or one of square images, are taken where both sides are at least 8 pixels.
        what: the array, in errors.
        advice: what to write for a layout, with `{}` in its place.

    Raises:
        UsageError: nobody has said the layout, and read in the usual one the images have more channels than pixels
            on a side, as those of the other layout do.
    """
    if layout is not None:
        if layout.upper() not in LAYOUTS:
            raise did_you_mean("layout", layout, LAYOUTS)
        return layout.upper() == "NHWC"
    other, *sides = shape[1:] if assumed else (shape[3], shape[1], shape[2])
    if min(sides) >= _LEAST_SIDE and (other == 3 or (other == 1 and sides[0] == sides[1])):
        return not assumed
    channels, height, width = (shape[3], shape[1], shape[2]) if assumed else tuple(shape[1:])
    square = height == width != channels
    if channels <= _MAX_CHANNELS or square or channels < min(height, width):
        return assumed
    taken, opposite = ("NHWC", "NCHW") if assumed else ("NCHW", "NHWC")
    raise UsageError(
        f"{what} have shape {tuple(shape)}, which read as ({', '.join(taken)}) means {channels} channels of "
        f"{height} x {width} pixels; write {advice.format(opposite)}, or {advice.format(taken)} if that is meant."
    )
