"""The order of a run: clean pass, then the suite's attacks on the images that are still robust, block by block."""

from __future__ import annotations

import itertools
import time

import numpy as np

from robustkit.attack_api import RowWise
from robustkit.core.errors import RunError
from robustkit.engine.allocation.rounds import Rounds
from robustkit.engine.evaluation.block_runner import BlockRunner
from robustkit.engine.evaluation.early_stopping import Limits, TimeUp
from robustkit.gradient_views.aggregator_substitutes import find_ensemble
from robustkit.gradient_views.discovery import is_applicable
from robustkit.registry import SuiteEntry
from robustkit.runs.report_parts import Stop


def run_images(runner: BlockRunner, limits: Limits, rounds: Rounds) -> None:
    """Run clean pass and suite over all images, or over as many blocks of them as the limits allow.

    Raises:
        RunError: if the time limit ends before any image was classified.
    """
    results = runner.results
    if not limits:
        run_suite(runner, results.scope, rounds)
        return
    if limits.seconds is not None:
        runner.deadline = time.perf_counter() + limits.seconds
    block = results.scope[:0]
    try:
        for block in limits.blocks(results, runner.settings.seed):
            run_suite(runner, block, rounds)
    except TimeUp:
        if len(results.scope):
            results.stopped = Stop("time-limit", results.n)
        else:
            results.stopped = _stop_in_first_block(runner, limits, block)


def _stop_in_first_block(runner: BlockRunner, limits: Limits, block: np.ndarray) -> Stop:
    """Count the images of the first block that were classified before the time was up."""
    results, entries = runner.results, runner.settings.entries
    results.scope = block[results.judged[block] >= 0]
    if not len(results.scope):
        raise RunError(
            f"no image was classified within {limits.seconds:g} seconds; run the same command again to "
            "go on, or give it more time."
        )
    always = [stage for stage, entry in enumerate(entries, 1) if not (entry.conditional or entry.arm)]
    last = len(entries) if runner.reliability.doubtful() else max(always, default=0)
    return Stop("time-limit", results.n, results.unfinished(results.scope, last))


def run_suite(runner: BlockRunner, positions: np.ndarray, rounds: Rounds | None) -> None:
    """Run clean pass and suite over these images; its arms only if `rounds` are given.

    Consecutive attacks of one kind run together. Conditional attacks run only if the results so far give reason to
    doubt gradients.
    """
    runner.run_clean(positions)
    if runner.settings.threat.minimal:
        runner.run_attack(1, positions)
        return
    views = [entry.view for entry in runner.settings.entries]
    for first, entries in _ordered_groups(runner):
        arm, conditional, row_wise, score = _kind(entries[0])
        if any(entry.view for entry in entries) and len(runner.results.waiting(first, positions)):
            runner.reliability.find_views()
        if arm:
            if rounds is not None:
                rounds.run(positions)
        elif conditional and not _is_needed(runner, first, positions, score=score):
            pass
        elif row_wise:
            runner.run_row_wise(first, len(entries), positions)
        else:
            for number, entry in enumerate(entries, first):
                if is_applicable(entry.view, runner.instrumented.views, views):
                    runner.run_attack(number, positions)


def _ordered_groups(runner: BlockRunner) -> list[tuple[int, list[SuiteEntry]]]:
    """Return consecutive attacks of one kind, with the stage of the first, in the order in which they run.

    On an ensemble the arms run after the attacks on its views: the mean of the members' logits fools images with a
    tenth of the passes that the arms take.
    """
    groups, stage = [], 1
    for _, group in itertools.groupby(runner.settings.entries, _kind):
        entries = list(group)
        groups.append((stage, entries))
        stage += len(entries)
    on_views = [number for number, (_, entries) in enumerate(groups) if any(entry.view for entry in entries)]
    if on_views and find_ensemble(runner.instrumented.model) is not None:
        before = groups[: on_views[-1] + 1]
        arms = [group for group in before if group[1][0].arm]
        groups = [group for group in before if group not in arms] + arms + groups[on_views[-1] + 1 :]
    return groups


def _is_needed(runner: BlockRunner, first: int, positions: np.ndarray, *, score: bool) -> bool:
    """Return whether conditional attacks should run: images are robust, and there is reason to doubt gradients."""
    if not len(runner.results.waiting(first, positions)):
        return False
    return runner.reliability.suspect() if score else runner.reliability.doubtful()


def _kind(entry: SuiteEntry) -> tuple[bool, bool, bool, bool]:
    """Return (arm, conditional, row-wise, conditional score attack without warm start) to group attacks by."""
    refines = getattr(entry.attack, "refine", False)
    score = entry.conditional and entry.attack.info.access == "score" and not refines
    return entry.arm, entry.conditional, isinstance(entry.attack, RowWise), score
