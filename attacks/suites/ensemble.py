"""Attacks on ensembles: on the mean logit, on each member, MORA, and on other aggregators.

The aggregators are those that broke CrossMax (Zhang et al. 2024, arXiv:2411.14834). Their results are judged on
the ensemble itself; these attacks are skipped for a model without members.
"""

from __future__ import annotations

from robustkit.registry import find, suite

# The remaining margin, as a share of the margin gained, up to which an image gets a second, longer attack.
DOUBT = 0.1
AGGREGATORS = ("mean-logit", "mean-log-probability", "top-k", "straight-through")


@suite("ensemble", paper="arXiv:2211.08008")
def ensemble(norm: str) -> list[str]:
    """`rapid`, then ascent on other aggregators and on each member, and MORA."""
    return [*find("suite", "rapid")(norm), *entries(norm)]


def entries(norm: str) -> list[str]:
    """Return the attacks that come after `rapid`."""
    attacks = [attack for view in AGGREGATORS for attack in climb(norm, view)]
    attacks.append("apgd(loss=margin,steps=20,restarts=1,large_start=false)@members")
    if norm != "l1":
        attacks += ["mora(steps=40,restarts=3)@stack", "mora-t(steps=40,targets=3)@stack"]
    return attacks


def climb(norm: str, view: str) -> list[str]:
    """Return the attacks on one view: one on all images, then one on images close to the boundary."""
    if norm == "l1":
        short = "steps=50,restarts=1,large_start=false"
        first = [f"apgd(loss=margin,{short})@{view}", f"apgd-t(loss=margin,targets=9,{short})@{view}"]
    else:
        first = [f"race(targets=9,probe=4,finalists=2,steps=40,restarts=1,doubt=0.3)@{view}"]
    # Another loss, step rule and other starts: most images that the first attack misses are this close.
    return [*first, f"apgd(loss=dlr,steps=100,restarts=2,large_start=false,doubt={DOUBT})@{view}"]
