"""The everyday suite: at least as strict as AutoAttack's `standard` at a small part of its cost.

Cheapest attacks first; what each stage is worth was measured, see docs/rapid.md. Those marked with * are arms:
which image gets which is decided by what they did on this net so far (`robustkit.engine.allocation.arms`).
Square is one of them: it finds out whether gradients tell the truth.
"""

from __future__ import annotations

from robustkit.registry import find, suite

FIRST_ATTACKS = [
    "pgd(steps=1,step_size=1,loss=margin,random_start=false)",
    "pgd(steps=5,step_size=0.5,loss=margin,random_start=false)",
]
# For images on which they are likely to succeed: AutoAttack's four, and two losses more with restarts.
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
    """Margin ascent on targets raced against each other, a second opinion by APGD and by Square."""
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
    """`rapid`, then AutoAttack's own attacks on what it left: at most AutoAttack's number."""
    return [*rapid(norm), *find("suite", "autoattack")(norm)]
