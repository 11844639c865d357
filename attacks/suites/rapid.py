"""The default suite: at least as strict as AutoAttack's `standard`, at a small part of its cost.

The cheapest attacks are first; the gain of each stage was measured, see docs/rapid.md. Those marked with * are
arms: which images they attack depends on their successes on this net so far (`robustkit.engine.allocation.arms`).
Square is one of them: it checks whether the gradients are reliable.
"""

from __future__ import annotations

from robustkit.registry import find, suite

FIRST_ATTACKS = [
    "pgd(steps=1,step_size=1,loss=margin,random_start=false)",
    "pgd(steps=5,step_size=0.5,loss=margin,random_start=false)",
]
# Run on images where they are likely to succeed: AutoAttack's four, and two more losses with restarts.
ARMS = [
    "apgd(loss=ce,steps=100)*",
    "apgd(loss=margin,steps=100,restarts=3)*",
    "apgd(loss=dlr,steps=100,restarts=3)*",
    "apgd-t*",
    "fab-t*",
    "square(queries=5000)*",
]


@suite("rapid")
def rapid(norm: str) -> list[str]:
    """Multi-targeted margin ascent (`race`), then APGD, FAB and Square on the images that may still be fooled."""
    if norm == "l1":
        hard = ["apgd(loss=margin,steps=50,restarts=1)", "apgd-t(loss=margin,steps=40,targets=9,restarts=1)"]
    else:
        hard = [
            "race(targets=9,probe=4,finalists=2,steps=40,restarts=3,doubt=0.3)",
            "apgd(loss=ce,steps=30,restarts=1)",
        ]
    return [*FIRST_ATTACKS, *hard, *ARMS]


@suite("rapid+autoattack")
def rapid_and_autoattack(norm: str) -> list[str]:
    """`rapid`, then AutoAttack's attacks on the images left: the result is at most AutoAttack's."""
    return [*rapid(norm), *find("suite", "autoattack")(norm)]
