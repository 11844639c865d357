"""The rounds of a run whose suite has arms: decided by the verdicts so far, written down before they begin."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from robustkit.core.errors import UsageError
from robustkit.core.numbers import share, shown
from robustkit.core.schema import Count, checked, parse
from robustkit.engine.allocation.arms import Evidence, allowed, following
from robustkit.engine.allocation.strictness import evidence_on, in_doubt, left_for_arms
from robustkit.engine.evaluation.block_runner import BlockRunner
from robustkit.runs.evaluation_record import Strictness, dumps
from robustkit.runs.ledger import Ledger
from robustkit.runs.run_folder import LEDGER


@dataclass(frozen=True)
class Decision:
    """The arm of one round, by its stage, and the positions it is given to; `test` is whether these were drawn."""

    stage: Count
    positions: Sequence[Count]
    test: bool


@dataclass(frozen=True)
class Rounds:
    """Gives the arms of a suite to images, until the bound on what they would still break is low enough.

    `strictness` is that bound as a share of the images; unless it is 0, one image of a small set may stay in
    doubt. A killed run reads its decisions back from the ledger.
    """

    runner: BlockRunner
    ledger: Ledger
    strictness: float

    def run(self, among: np.ndarray) -> None:
        """Take these positions through as many rounds as are needed."""
        left = left_for_arms(self.runner.results, among)
        block = hashlib.sha256(np.sort(among).tobytes()).hexdigest()[:16]
        drawn: set[int] = set()
        for number in itertools.count():
            decision = self._decision(f"round {block} {number}", left, len(among), drawn)
            if decision is None:
                return
            drawn.update(decision.positions if decision.test else ())
            self.runner.run_row_wise(decision.stage, 1, np.array(decision.positions, np.int64))

    def _decision(self, key: str, left: np.ndarray, n: int, drawn: Collection[int]) -> Decision | None:
        """Return what was decided for a round before, else decide it; None where no more is needed."""
        ledger, stages = self.ledger, self.stages
        noted = ledger.read_note(key)
        if noted is None:
            chosen = following(self._evidence(left, n, drawn)) if len(left) and stages else None
            decision = chosen and Decision(stages[chosen.arm], left[chosen.images].tolist(), chosen.test)
            noted = ledger.note(key, dumps(decision))
        written: Decision | None = checked(Decision | None, parse(noted, LEDGER), LEDGER)
        if written is not None and not (written.stage in stages and set(written.positions) <= set(left.tolist())):
            raise UsageError(f"{LEDGER} is damaged: its {key} is of another run; begin anew with --overwrite.")
        return written

    def known(self, among: np.ndarray) -> Evidence | None:
        """Return what is known of these positions as far as they came to the arms; None without any."""
        return self._evidence(left_for_arms(self.runner.results, among), len(among)) if self.stages else None

    def doubt(self, among: np.ndarray) -> Strictness | None:
        """Return what is left of doubt in these positions; None of a random model, for which AutoAttack is not."""
        if self.runner.instrumented.random:
            return None
        return in_doubt(self.runner.results, among, self.strictness)

    @property
    def stages(self) -> list[int]:
        """The stages of the arms; scores of a random model are luck."""
        entries, random = self.runner.settings.entries, self.runner.instrumented.random
        arms = self.runner.results.arms
        return [stage for stage in arms if not (random and entries[stage - 1].attack.info.access == "score")]

    def _evidence(self, left: np.ndarray, n: int, drawn: Collection[int] = ()) -> Evidence:
        """Return what is known of these positions of n."""
        settings = self.runner.settings
        classes, norm = self.runner.instrumented.num_classes or 2, settings.threat.norm
        attacks = [settings.entries[stage - 1].attack for stage in self.stages]
        passes = [2 if attack.loop_options(norm).needs_gradient else 1 for attack in attacks]
        costs = np.array([attack.budget(classes, norm) for attack in attacks]) * passes
        return evidence_on(self.runner.results, left, self.stages, costs, allowed(self.strictness, n), drawn)


def read_strictness(value: str | float | None) -> float | None:
    """Return the share of the images that may be left in doubt; None, the usual one, where it is not given.

    Raises:
        UsageError: it is no share from 0 to 1.
    """
    if value is None:
        return None
    try:
        return share(value)
    except ValueError as error:
        raise UsageError(
            f"strictness {shown(value)} {error}; write a share of the images, such as '0.05 %' or 0.0005."
        ) from error
