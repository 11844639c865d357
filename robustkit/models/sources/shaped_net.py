"""Nets that were exported for images of one shape."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from robustkit.core.errors import UsageError
from robustkit.core.preprocess import Preprocess


@dataclass(frozen=True)
class InputShape:
    """The shape of the images of an exported net; None for a side that may be of any length.

    Attributes:
        batch: Number of images of each pass.
        channels: Channels of an image.
        height: In pixels.
        width: In pixels.
    """

    batch: int | None
    channels: int | None
    height: int | None
    width: int | None

    @classmethod
    def read(cls, sides: Sequence[object], path: object) -> InputShape:
        """Return the shape of four sides, of which those that are no positive whole number may be any.

        Raises:
            UsageError: There are not four sides.
        """
        if len(sides) != 4:
            raise UsageError(
                f"model file '{path}' takes an input of {len(sides)} axes, not images of shape (B, C, H, W): "
                "export a net that takes images."
            )
        return cls(*(side if isinstance(side, int) and side > 0 else None for side in sides))

    @property
    def preprocess(self) -> Preprocess | None:
        """How image files are read for the net, if its height and width are fixed."""
        if self.height is None or self.width is None:
            return None
        return Preprocess((self.height, self.width), resize=min(self.height, self.width))

    @property
    def notes(self) -> tuple[str, ...]:
        """A sentence for the user about a fixed number of images."""
        if self.batch is None:
            return ()
        images = f"{self.batch} image{'s' * (self.batch != 1)}"
        return (
            f"the file was exported for {images} in each pass, so other batches are divided and filled up: "
            "export it with a dynamic batch to save these passes",
        )


class ShapedNet(nn.Module):
    """A net that takes images of a known shape alone.

    Attributes:
        net: Maps images (B C H W) to its output.
        shape: Of the images that it takes.
        model: What errors call the model.
    """

    def __init__(self, net: Callable[[torch.Tensor], object], shape: InputShape, model: str) -> None:
        """Wrap a net."""
        super().__init__()
        self.net: Any = net
        self.shape, self.model = shape, model

    def forward(self, images: torch.Tensor) -> object:
        """Return the net's output.

        Raises:
            UsageError: The images have another shape than the file was exported for.
        """
        given = images.shape[1:]
        wanted = (self.shape.channels, self.shape.height, self.shape.width)
        if len(given) != 3 or any(side not in (None, other) for side, other in zip(wanted, given, strict=True)):
            text = ", ".join("any" if side is None else str(side) for side in wanted)
            advice = "export the file again for such images"
            if None not in wanted and len(given) == 3 and given[0] == wanted[0]:
                advice = f"write size={wanted[1]},{wanted[2]} in its string to resize them"
            elif len(given) == 3 and given[0] != wanted[0] and wanted[0] is not None:
                advice = f"give it images of {wanted[0]} channel{'s' * (wanted[0] != 1)}"
            raise UsageError(
                f"model {self.model!r} was exported for images of shape ({text}), not {tuple(given)}: {advice}."
            )
        return self.net(images)
