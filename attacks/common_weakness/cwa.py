"""The common weakness attack (Chen et al. 2024, arXiv:2303.09105), MI-CWA: a reverse step, then `mi-cse`'s loop.

Follows the paper's Algorithm 1 (`compat=paper`) and the authors' code (`compat=official`,
huanranchen/AdversarialAttacks at cc24144), which sums logits in the reverse step, normalises the outer step (see
`mi-cse`) and has five times the paper's beta. That code changes the caller's images in place; this one does not.
Its steps are fixed in pixels, for 16/255; here they are fractions of eps in both forms. Its SSA-CWA has no reverse
step, which is `mi-cse+ssa` here; `ssa-cwa` is the paper's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from robustkit.attack_api import Oracle, Rows, Weights, split_rng
from robustkit.attacks.common_weakness.mi_cse import MICSE
from robustkit.attacks.common_weakness.mi_sam import step_back, summed
from robustkit.core.shapes import Images
from robustkit.registry import attack, recipe
from robustkit.registry.ranges import NonNegative


@attack("cwa", paper="arXiv:2303.09105", norms=("linf", "l2"), access="gradient", ascent=True)
@dataclass(frozen=True, slots=True)
class CWA(MICSE):
    """Searches flat maxima common to all members; each step takes one gradient of all, then one of each in turn.

    `reverse` is the reverse step, a fraction of eps; at 0 it costs nothing and the attack is `mi-cse`. The other
    fields are those of `mi-cse`. The default of `beta` in the official form is 10.27, its 250 at 16/255 and 224
    pixels.
    """

    reverse: NonNegative = 1 / 15

    @property
    def default_beta(self) -> float:
        """The default of `beta`."""
        return 10.27 if self.official else 2.05

    @property
    def cost(self) -> int:
        """The cost of a step in gradients of all members, the reverse step included."""
        return super(CWA, self).cost + bool(self.reverse)

    def start(
        self, oracle: Oracle, rows: Rows, x: Images, members: Sequence[int] | None, weights: Weights
    ) -> Images:
        """Return x after the reverse step."""
        if not self.reverse:
            return x
        if weights is None and self.official:
            weights = summed(oracle, x, members)
        gradient = oracle.gradient(split_rng(rows, "sam"), x, members, weights)
        return rows.retract(step_back(rows, x, gradient, self.reverse))


@recipe("ssa-cwa", paper="arXiv:2303.09105")
def ssa_cwa() -> str:
    """CWA with the gradients of spectrum simulation."""
    return "cwa+ssa"


@recipe("vmi-cwa", paper="arXiv:2303.09105")
def vmi_cwa() -> str:
    """CWA with each member's gradient tuned by its variance, over 8 neighbours as in the authors' code."""
    return "cwa+vmi(copies=8)"


@recipe("vmi-inner-cwa", paper="arXiv:2303.09105")
def vmi_inner_cwa() -> str:
    """CWA with each member's gradient taken at 8 neighbours, as in the authors' code."""
    return "cwa+vmi-mean(copies=8,of=member)"


@recipe("vmi-outer-cwa", paper="arXiv:2303.09105")
def vmi_outer_cwa() -> str:
    """CWA whose whole step is averaged over 8 neighbours, as in the authors' code."""
    return "cwa+vmi-mean(copies=8,beta=1,of=step)"


@recipe("adam-cwa", paper="arXiv:2303.09105")
def adam_cwa() -> str:
    """CWA with Adam for the outer step."""
    return "cwa(update=adam)"
