"""The rounds of a run whose suite has arms: decided from the verdicts so far, recorded before they start."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from robustkit.core.errors import UsageError
from robustkit.core.numbers import share, shown
from robustkit.core.schema import Count, checked, parse
from robustkit.engine.allocation.arms import Evidence, allowed, following
from robustkit.engine.allocation.strictness import Drawn, evidence_on, in_doubt, left_for_arms
from robustkit.engine.evaluation.block_runner import BlockRunner
from robustkit.runs.ledger import Ledger
from robustkit.runs.report_parts import Strictness
from robustkit.runs.run_folder import LEDGER
from robustkit.runs.spec import dumps


@dataclass(frozen=True)
class Decision:
    """The stage of one round's arm and the positions it runs on; `test` is whether these were drawn."""

    stage: Count
    positions: Sequence[Count]
    test: bool


@dataclass(frozen=True)
class Rounds:
    """Runs the arms of a suite on images until the bound on those that they would still fool is low enough.

    `strictness` is that bound as a share of the images; unless it is 0, at least one image may stay in doubt. A
    killed run reads its decisions from the ledger.
    """

    runner: BlockRunner
    ledger: Ledger
    strictness: float

    def run(self, positions: np.ndarray) -> None:
        """Run as many rounds over these positions as are needed."""
        left = left_for_arms(self.runner.results, positions)
        block = hashlib.sha256(np.sort(positions).tobytes()).hexdigest()[:16]
        drawn: dict[int, set[int]] = {stage: set() for stage in self.stages}
        for number in itertools.count():
            decision = self._decision(f"round {block} {number}", left, len(positions), drawn)
            if decision is None:
                return
            if decision.test:
                drawn[decision.stage].update(decision.positions)
            self.runner.run_row_wise(decision.stage, 1, np.array(decision.positions, np.int64))

    def _decision(self, key: str, left: np.ndarray, n: int, drawn: Drawn) -> Decision | None:
        """Return the recorded decision of a round, or decide it; None if no more rounds are needed."""
        ledger, stages = self.ledger, self.stages
        recorded = ledger.read_note(key)
        if recorded is None:
            chosen = following(self._evidence(left, n, drawn)) if len(left) and stages else None
            decision = chosen and Decision(stages[chosen.arm], left[chosen.images].tolist(), chosen.test)
            recorded = ledger.note(key, dumps(decision))
        written: Decision | None = checked(Decision | None, parse(recorded, LEDGER), LEDGER)
        if written is not None and not (written.stage in stages and set(written.positions) <= set(left.tolist())):
            raise UsageError(f"{LEDGER} is damaged: its {key} is of another run; start again with --overwrite.")
        return written

    def known(self, positions: np.ndarray) -> Evidence | None:
        """Return the evidence on those of these positions that reached the arms; None for a suite without arms."""
        return (
            self._evidence(left_for_arms(self.runner.results, positions), len(positions)) if self.stages else None
        )

    def doubt(self, positions: np.ndarray) -> Strictness | None:
        """Return the remaining doubt in these positions; None for a random model."""
        if self.runner.instrumented.random:
            return None
        return in_doubt(self.runner.results, positions, self.strictness)

    @property
    def stages(self) -> list[int]:
        """The stages of the arms; without score attacks for a random model."""
        entries, random = self.runner.settings.entries, self.runner.instrumented.random
        arms = self.runner.results.arms
        return [stage for stage in arms if not (random and entries[stage - 1].attack.info.access == "score")]

    def _evidence(self, left: np.ndarray, n: int, drawn: Drawn | None = None) -> Evidence:
        """Return the evidence on these positions of n."""
        settings = self.runner.settings
        classes, norm = self.runner.instrumented.num_classes or 2, settings.threat.norm
        attacks = [settings.entries[stage - 1].attack for stage in self.stages]
        passes = [2 if attack.loop_options(norm).needs_gradient else 1 for attack in attacks]
        costs = np.array([attack.budget(classes, norm) for attack in attacks]) * passes
        return evidence_on(self.runner.results, left, self.stages, costs, allowed(self.strictness, n), drawn or {})


def read_strictness(value: str | float | None) -> float | None:
    """Return the share of the images that may be left in doubt; None, for the default, if it is not given.

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
