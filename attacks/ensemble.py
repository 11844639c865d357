"""Attacks that know they face an ensemble: its mean logit, its members one by one, MORA, other aggregators.

The aggregators are those by which CrossMax was broken (Zhang et al. 2024, arXiv:2411.14834). What they find is
judged on the ensemble as it is; a model without members is spared them.
"""

from __future__ import annotations

from robustkit.registry import find, suite

AGGREGATORS = ("mean-logit", "mean-log-probability", "top-k", "straight-through")


@suite("ensemble", paper="arXiv:2211.08008")
def ensemble(norm: str) -> list[str]:
    """`rapid`, then ascent on other aggregators and on each member, and MORA."""
    return [*find("suite", "rapid")(norm), *rungs(norm)]


def rungs(norm: str) -> list[str]:
    """Return the attacks that come after `rapid`."""
    found = [attack for view in AGGREGATORS for attack in climb(norm, view)]
    found.append("apgd(loss=margin,steps=20,restarts=1,large_start=false)@members")
    if norm != "l1":
        found += ["mora(steps=40,restarts=3)@stack", "mora-t(steps=40,targets=3)@stack"]
    return found


def climb(norm: str, view: str) -> list[str]:
    """Return the attacks on one view."""
    if norm == "l1":
        few = "steps=50,restarts=1,large_start=false"
        return [f"apgd(loss=margin,{few})@{view}", f"apgd-t(loss=margin,targets=9,{few})@{view}"]
    return [f"race(targets=9,probe=4,finalists=2,steps=40,restarts=1,doubt=0.3)@{view}"]
