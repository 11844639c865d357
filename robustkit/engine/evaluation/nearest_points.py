"""The nearest adversarial points of some images, and how far they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from robustkit.core.shapes import Images, Mask, PerRow


@dataclass(frozen=True)
class MinimumNorm:
    """What `robustkit.minimum_norm` found.

    Attributes:
        x: the nearest adversarial images (B C H W); the clean image where none was found or it is wrong already.
        distance: of each from its clean image (B), float64, in pixel units of [0, 1]; 0 where the clean image is
            wrong already, infinite where none was found.
        attack: what found each one: an attack's name, `clean` or None.
        forwards: images through the model, for all of them together, verdicts included.
        backwards: images back through it.
    """

    x: Images
    distance: PerRow
    attack: Sequence[str | None]
    forwards: int
    backwards: int

    @property
    def passes(self) -> float:
        """The mean passes of an image, forward and backward."""
        return (self.forwards + self.backwards) / max(len(self.attack), 1)

    @property
    def found(self) -> Mask:
        """For which images there is an adversarial one (B)."""
        return self.distance.isfinite()
