"""Which axis of an array of images has the channels. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence

from robustkit.core.errors import UsageError, did_you_mean

LAYOUTS = ("NCHW", "NHWC")
# Up to this many channels are accepted however small the image is.
_MAX_CHANNELS = 4
# An axis at least this long is a side, not channels, if another axis has the length of grey or colour channels.
_LEAST_SIDE = 8


def channels_last(shape: Sequence[int], layout: str | None, assumed: bool, what: str, advice: str) -> bool:
    """Return whether the channels of images are the last axis.

    Args:
        shape: of the array, four axes.
        layout: `NCHW` or `NHWC`, or None if the user did not give it.
        assumed: the result without a layout, unless the shape contradicts it. Three channels on the other axis, or
            one of square images, are accepted if both sides are at least 8 pixels.
        what: the array, in errors.
        advice: how the user can set a layout, with `{}` for its name.

    Raises:
        UsageError: without a layout, if the assumed one gives the images more channels than pixels on a side, as
        those of the other layout would have.
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
