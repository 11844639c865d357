"""Fast adversarial training (Wong et al. 2020, arXiv:2001.03994): one FGSM step from a random start.

Without `random_start` and with `step_size=1` it is the FGSM training of Goodfellow et al. 2015 (arXiv:1412.6572).
Both can fail by catastrophic overfitting: the net stays robust to single steps but not to PGD. This happens with a
large eps, in long runs and without the random start. `robustkit evaluate` shows whether it did.
"""

from __future__ import annotations

from dataclasses import dataclass

from robustkit.core.step_size import StepSize
from robustkit.defenses.adversarial_training.pgd_at import PGDAT
from robustkit.registry import method
from robustkit.registry.ranges import Count


@method("fgsm-at", paper="arXiv:2001.03994")
@dataclass(frozen=True, slots=True)
class FGSMAT(PGDAT):
    """`pgd-at` with one step of 1.25 eps, as in the paper."""

    steps: Count = 1
    step_size: StepSize = StepSize(1.25)
