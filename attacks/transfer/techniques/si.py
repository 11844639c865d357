"""Scale invariance (Lin et al. 2020, arXiv:1908.06281): the mean gradient over darker copies of the images.

A copy is the image on [0, 1] divided by a power of two, where the authors' code divides it on [-1, 1].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from robustkit.attack_api import Oracle, Rows, Technique, TransformedOracle
from robustkit.core.limits import Limits
from robustkit.core.shapes import Images
from robustkit.registry import recipe, technique


@recipe("si-ni-fgsm", paper="arXiv:1908.06281")
def si_ni_fgsm() -> str:
    """`ni-fgsm` with gradients averaged over darker copies."""
    return "ni-fgsm+si"


@technique("si", paper="arXiv:1908.06281")
@dataclass(frozen=True, slots=True)
class SI(Technique):
    """Averages over the image and copies at half, a quarter … of its brightness; costs `copies` gradients."""

    copies: Annotated[int, Limits(1, 64)] = 5

    @property
    def cost(self) -> int:
        """The cost in gradients: one a copy."""
        return self.copies

    def wrap(self, inner: Oracle) -> Oracle:
        """Return an oracle that takes the gradient at each scale."""
        return TransformedOracle(inner, "si", self.copies, self._transform)

    def _transform(self, rows: Rows, x: Images, number: int) -> Images:
        return x / (1 << number)
