"""The common weakness attack (Chen et al. 2024, arXiv:2303.09105), MI-CWA: a step back, then `mi-cse`'s loop.

Follows the paper's Algorithm 1 (`compat=paper`) and the authors' code (`compat=official`,
huanranchen/AdversarialAttacks at cc24144), which sums logits in the step back, normalises the outer step (see
`mi-cse`) and has five times the paper's beta. That code moves the caller's images; this does not. Its steps are
fixed in pixels, for 16/255; here they are fractions of eps in both forms. Its SSA-CWA leaves the step back out,
which is `mi-cse+ssa` here; `ssa-cwa` is the paper's.
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
    """Seeks flat maxima that members share; a gradient of all members, then one of each in turn, in every step.

    `reverse` is the step back, a fraction of eps; at 0 it costs nothing and leaves `mi-cse`. The other fields are
    those of `mi-cse`, but none as `beta` means 10.27 in the official form, its 250 at 16/255 and 224 pixels.
    """

    reverse: NonNegative = 1 / 15

    @property
    def default_beta(self) -> float:
        """What `beta` is if none is given."""
        return 10.27 if self.official else 2.05

    @property
    def cost(self) -> int:
        """Gradients of all members that a step costs, that of the step back included."""
        return super(CWA, self).cost + bool(self.reverse)

    def start(
        self, oracle: Oracle, rows: Rows, x: Images, members: Sequence[int] | None, weights: Weights
    ) -> Images:
        """Return x after the step back."""
        if not self.reverse:
            return x
        if weights is None and self.official:
            weights = summed(oracle, x, members)
        gradient = oracle.gradient(split_rng(rows, "sam"), x, members, weights)
        return rows.threat.retract(step_back(rows, x, gradient, self.reverse), rows.x)


@recipe("ssa-cwa", paper="arXiv:2303.09105")
def ssa_cwa() -> str:
    """CWA on the spectrum simulation attack's gradients."""
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
    """CWA whose whole step is taken from 8 neighbours, as in the authors' code."""
    return "cwa+vmi-mean(copies=8,beta=1,of=step)"


@recipe("adam-cwa", paper="arXiv:2303.09105")
def adam_cwa() -> str:
    """CWA with Adam for the outer step."""
    return "cwa(update=adam)"
