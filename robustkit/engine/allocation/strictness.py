"""What a ledger says of the arms of a suite: what they gained where, and what is left in doubt."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from robustkit.engine.allocation.arms import Evidence, allowed
from robustkit.engine.evaluation.results import ROBUST, RunResults
from robustkit.engine.evaluation.verdicts import sample_ids
from robustkit.runs.evaluation_record import Strictness

# The share of the images that the arms may still break, by the upper bound, where nobody says how many.
STRICTNESS = 0.002
# AutoAttack's `standard` by its own package.
AUTOATTACK = {f"autoattack:{name}" for name in ("apgd-ce", "apgd-t", "fab-t", "square")}


def left_for_arms(results: RunResults, among: np.ndarray) -> np.ndarray:
    """Return the positions of these that the stages before the arms left."""
    left: np.ndarray = among[(results.judged[among] >= 0) & (results.fell[among] >= min(results.arms, default=0))]
    return left


def evidence_on(
    results: RunResults,
    left: np.ndarray,
    arms: Sequence[int],
    costs: np.ndarray,
    may: int,
    drawn: Collection[int] = (),
) -> Evidence:
    """Return what is known of these positions.

    Args:
        results: of the ledger.
        left: positions that the stages before the arms left (n).
        arms: the stages that count as arms (A).
        costs: passes that each takes of an image (A).
        may: how many images they may still break, by the upper bound.
        drawn: positions that were in a round of the test.
    """
    # A tie in the clean image's logits is a margin of 0; the mean of a random model's may be below it.
    clean = np.maximum(results.clean_margins[left], np.finfo(np.float32).tiny)
    reached = results.reached[[results.arms.index(stage) for stage in arms]][:, left]
    lowest = np.fmin.accumulate(np.concatenate([results.before[None, left], reached[:-1]]))
    broken = results.fell[left] == np.array(arms)[:, None]
    return Evidence(
        left=np.clip(lowest / clean, 0, 1),
        now=np.clip(results.margins[left] / clean, 0, 1),
        gains=np.where(broken, np.inf, (lowest - reached) / clean),
        standing=results.fell[left] == ROBUST,
        keys=sample_ids([results.images[at] for at in left]).numpy(),
        drawn=np.isin(left, list(drawn)),
        costs=costs,
        allowed=may,
    )


def in_doubt(results: RunResults, among: np.ndarray, strictness: float) -> Strictness | None:
    """Return what is left of doubt in these positions; None where the suite has no arms.

    Args:
        results: of the ledger.
        among: the positions that count (n).
        strictness: the share of the images that may be left in doubt.
    """
    if not results.arms:
        return None
    left, may = left_for_arms(results, among), allowed(strictness, len(among))
    evidence = evidence_on(results, left, results.arms, np.ones(len(results.arms)), may)
    # After AutoAttack itself there is no doubt about it.
    sure = set(results.names) >= AUTOATTACK
    images = 0 if sure else evidence.bound
    in_full = evidence.standing & (sure | ~evidence.open.any(0))
    return Strictness(
        images=images,
        bound=images / len(among),
        allowed=strictness,
        standing=int(evidence.standing.sum()),
        in_full=int(in_full.sum()),
    )
