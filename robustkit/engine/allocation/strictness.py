"""The gains of a suite's arms in a run's results, and the remaining doubt."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np

from robustkit.core.errors import UsageError
from robustkit.engine.allocation.arms import Evidence, allowed
from robustkit.engine.evaluation.results import ROBUST, RunResults
from robustkit.engine.evaluation.verdicts import sample_ids
from robustkit.registry import find
from robustkit.runs.report_parts import SCORE_TESTED, Strictness

# The default share of the images that the arms may still fool, by the upper bound.
STRICTNESS = 0.002
# AutoAttack's `standard` version, by its own package.
AUTOATTACK = {f"autoattack:{name}" for name in ("apgd-ce", "apgd-t", "fab-t", "square")}


# Positions that were drawn for the test of each arm, by its stage.
Drawn = Mapping[int, Collection[int]]
# A score attack may have ended early if it removed less than this share of the clean margin, the last of Square's
# checkpoints. Its gain counts as none if it removed less than this share of what gradients removed: the least
# share of a search that gained in the end was 0.49 (docs/rapid.md).
ENDED_BELOW, IDLE_BELOW = 0.95, 0.45


def _by_scores(stage: str) -> bool:
    """Return whether the attack of this stage is a score attack, by its name."""
    try:
        return bool(find("attack", stage.partition("(")[0]).info.access == "score")
    except UsageError:
        # The code of a plug-in is not there when its run is verified.
        return False


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
    drawn: Drawn,
) -> Evidence:
    """Return the evidence on these positions.

    Args:
        results: of the ledger.
        left: positions that are robust after the stages before the arms (n).
        arms: the stages of the arms (A).
        costs: passes of each on an image (A).
        allowed_images: how many images they may still fool, by the upper bound.
        drawn: positions that were in a test round of each arm, by its stage.
    """
    # The clean margin is 0 for a tie; the mean of a random model's may be below 0.
    clean = np.maximum(results.clean_margins[left], np.finfo(np.float32).tiny)
    reached = results.reached[[results.arms.index(stage) for stage in arms]][:, left]
    lowest = np.fmin.accumulate(np.concatenate([results.before[None, left], reached[:-1]]))
    broken = results.fooled_at[left] == np.array(arms)[:, None]
    by_scores = np.array([_by_scores(results.names[stage]) for stage in arms], bool)
    # What a search that ended early would have gained is known only if it had come far less close than others.
    ended = by_scores[:, None] & (reached > (1 - ENDED_BELOW) * clean) & (reached < clean)
    ended &= clean - reached >= IDLE_BELOW * (clean - lowest)
    gains = np.where(broken, np.inf, (lowest - reached) / clean)
    return Evidence(
        left=np.clip(lowest / clean, 0, 1),
        now=np.clip(results.margins[left] / clean, 0, 1),
        gains=np.where(ended & ~broken, -np.inf, gains),
        standing=results.fooled_at[left] == ROBUST,
        keys=sample_ids([results.images[position] for position in left]).numpy(),
        drawn=np.array([np.isin(left, list(drawn.get(stage, ()))) for stage in arms]).reshape(len(arms), -1),
        costs=costs,
        tested=np.where(by_scores, SCORE_TESTED, 0),
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
    evidence = evidence_on(results, left, results.arms, np.ones(len(results.arms)), allowed_images, {})
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
