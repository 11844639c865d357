"""Diagnoses of models that are random or that optimise inside the forward pass."""

from __future__ import annotations

from robustkit.checks.probe import Probe
from robustkit.checks.repeated_calls import SEEDERS, UNCHANGED, change
from robustkit.core.flags import Flag, passed, unmeasured


def randomised(probe: Probe) -> Flag:
    """Outputs that change from one call to the next; names the random generators that they depend on.

    Five calls and the tolerance, 1e-4 on normalised logits, are AutoAttack's; each call has other seeds. Sources
    are found by seeding all generators alike, then each one differently. The caller isolates the generators.
    """
    if probe.attacks and all(getattr(attack, "eot_iter", 1) > 1 for attack in probe.attacks):
        return unmeasured("randomised", "the suite averages over draws in any case", "nothing to do")
    gap = probe.change_between_calls
    what = "is the largest change of the normalised logits between calls"
    if gap <= UNCHANGED:
        return passed("randomised", round(gap, 6), what)
    first = probe.seeded_logits()
    still = change(first, probe.seeded_logits()) > UNCHANGED
    sources = [
        name for name in SEEDERS if not still and change(first, probe.seeded_logits(differently=name)) > UNCHANGED
    ]
    return Flag(
        "randomised",
        "warning",
        round(gap, 6),
        f"{what}: the model is random (source: "
        f"{', '.join(sources) or 'none of the generators of torch, numpy, random'}), "
        "and a verdict is what most draws say",
        "use --suite auto or adaptive, which average gradients over draws too",
    )


def optimises_at_test_time(probe: Probe) -> Flag:
    """Gradient computations inside the forward pass."""
    calls = probe.alone[1]
    if not calls:
        return passed("test-time-optimisation", 0, "gradient calls are made inside one forward pass")
    return Flag(
        "test-time-optimisation",
        "warning",
        calls,
        f"gradient call{'s are' if calls > 1 else ' is'} made inside one forward pass: attacks do not "
        f"differentiate through them",
        "also run an adaptive attack",
    )
