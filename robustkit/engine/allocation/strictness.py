"""The gains of a suite's arms in a run's results, and the remaining doubt."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from robustkit.engine.allocation.arms import Evidence, allowed
from robustkit.engine.evaluation.results import ROBUST, RunResults
from robustkit.engine.evaluation.verdicts import sample_ids
from robustkit.runs.report_parts import Strictness

# The default share of the images that the arms may still fool, by the upper bound.
STRICTNESS = 0.002
# AutoAttack's `standard` version, by its own package.
AUTOATTACK = {f"autoattack:{name}" for name in ("apgd-ce", "apgd-t", "fab-t", "square")}


def left_for_arms(results: RunResults, positions: np.ndarray) -> np.ndarray:
    """Return those of these positions that are robust after the stages before the arms."""
    left: np.ndarray = positions[
        (results.judged[positions] >= 0) & (results.fooled_at[positions] >= min(results.arms, default=0))
    ]
    return left


def evidence_on(
    results: RunResults,
    left: np.ndarray,
    arms: Sequence[int],
    costs: np.ndarray,
    allowed_images: int,
    drawn: Collection[int] = (),
) -> Evidence:
    """Return the evidence on these positions.

    Args:
        results: of the ledger.
        left: positions that are robust after the stages before the arms (n).
        arms: the stages of the arms (A).
        costs: passes of each on an image (A).
        allowed_images: how many images they may still fool, by the upper bound.
        drawn: positions that were in a test round.
    """
    # The clean margin is 0 for a tie; the mean of a random model's may be below 0.
    clean = np.maximum(results.clean_margins[left], np.finfo(np.float32).tiny)
    reached = results.reached[[results.arms.index(stage) for stage in arms]][:, left]
    lowest = np.fmin.accumulate(np.concatenate([results.before[None, left], reached[:-1]]))
    broken = results.fooled_at[left] == np.array(arms)[:, None]
    return Evidence(
        left=np.clip(lowest / clean, 0, 1),
        now=np.clip(results.margins[left] / clean, 0, 1),
        gains=np.where(broken, np.inf, (lowest - reached) / clean),
        standing=results.fooled_at[left] == ROBUST,
        keys=sample_ids([results.images[position] for position in left]).numpy(),
        drawn=np.isin(left, list(drawn)),
        costs=costs,
        allowed=allowed_images,
    )


def in_doubt(results: RunResults, positions: np.ndarray, strictness: float) -> Strictness | None:
    """Return the remaining doubt in these positions; None for a suite without arms.

    Args:
        results: of the ledger.
        positions: those that count (n).
        strictness: the share of the images that may be left in doubt.
    """
    if not results.arms:
        return None
    left, allowed_images = left_for_arms(results, positions), allowed(strictness, len(positions))
    evidence = evidence_on(results, left, results.arms, np.ones(len(results.arms)), allowed_images)
    # After AutoAttack itself no image is in doubt.
    sure = set(results.names) >= AUTOATTACK
    images = 0 if sure else evidence.bound
    in_full = evidence.standing & (sure | ~evidence.open.any(0))
    return Strictness(
        images=images,
        bound=images / len(positions),
        allowed=strictness,
        standing=int(evidence.standing.sum()),
        in_full=int(in_full.sum()),
    )
