"""The rounds of a run whose suite has arms: decided by the verdicts so far, written down before they begin."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from robustkit.engine.allocation import Evidence, allowed, following
from robustkit.engine.evidence import PRIORS
from robustkit.engine.folder import LEDGER
from robustkit.engine.judge import sample_ids
from robustkit.engine.tally import STANDS
from robustkit.engine.worker import Worker
from robustkit.errors import UsageError
from robustkit.ledger import Ledger
from robustkit.numbers import share, shown
from robustkit.record import Strictness, dumps
from robustkit.schema import Count, checked, parse

# The share of the images that the arms may still break, by the upper bound, where nobody says how many.
STRICTNESS = 0.002
# AutoAttack's `standard` by its own package.
AUTOATTACK = {f"autoattack:{name}" for name in ("apgd-ce", "apgd-t", "fab-t", "square")}


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

    worker: Worker
    ledger: Ledger
    strictness: float

    def run(self, among: np.ndarray) -> None:
        """Take these positions through as many rounds as are needed."""
        left = self._left(among)
        block = hashlib.sha256(np.sort(among).tobytes()).hexdigest()[:16]
        drawn: set[int] = set()
        for number in itertools.count():
            decision = self._decision(f"round {block} {number}", left, len(among), drawn)
            if decision is None:
                return
            drawn.update(decision.positions if decision.test else ())
            self.worker.fly(decision.stage, 1, np.array(decision.positions, np.int64))

    def _decision(self, key: str, left: np.ndarray, n: int, drawn: Collection[int]) -> Decision | None:
        """Return what was decided for a round before, else decide it; None where no more is needed."""
        ledger, stages = self.ledger, self.stages
        noted = ledger.read_note(key)
        if noted is None:
            chosen = following(self._evidence(left, n, drawn)) if len(left) and stages else None
            decision = chosen and Decision(stages[chosen.arm], left[chosen.images].tolist(), chosen.test)
            noted = ledger.note(key, dumps(decision))
        written = checked(Decision | None, parse(noted, LEDGER), LEDGER)
        if written is not None and not (written.stage in stages and set(written.positions) <= set(left.tolist())):
            raise UsageError(f"{LEDGER} is damaged: its {key} is of another run; begin anew with --overwrite.")
        return written

    def known(self, among: np.ndarray) -> Evidence | None:
        """Return what is known of these positions as far as they came to the arms; None without any."""
        return self._evidence(self._left(among), len(among)) if self.stages else None

    def doubt(self, among: np.ndarray) -> Strictness | None:
        """Return what is left of doubt in these positions; None of a random model, for which AutoAttack is not."""
        evidence = self.known(among)
        if self.worker.meter.random or evidence is None:
            return None
        # After AutoAttack itself there is no doubt about it.
        sure = {rung.name for rung in self.worker.rungs} >= AUTOATTACK
        in_full = evidence.standing & (sure | ~evidence.open.any(0))
        images = 0 if sure else evidence.bound
        return Strictness(
            images=images,
            bound=images / len(among),
            allowed=self.strictness,
            standing=int(evidence.standing.sum()),
            in_full=int(in_full.sum()),
        )

    @property
    def stages(self) -> list[int]:
        """The stages of the arms; scores of a random model are luck."""
        rungs, random = self.worker.rungs, self.worker.meter.random
        return [
            stage for stage in self.worker.tally.arms if not (random and rungs[stage - 1].attack.second_opinion)
        ]

    def _left(self, among: np.ndarray) -> np.ndarray:
        """Return the positions that the stages before the arms left of these."""
        tally = self.worker.tally
        return among[(tally.judged[among] >= 0) & (tally.fell[among] >= min(tally.arms, default=0))]

    def _evidence(self, left: np.ndarray, n: int, drawn: Collection[int] = ()) -> Evidence:
        """Return what is known of these positions of n."""
        tally, meter, stages = self.worker.tally, self.worker.meter, self.stages
        attacks = [self.worker.rungs[stage - 1].attack for stage in stages]
        norm, classes = self.worker.threat.norm, meter.num_classes or 2
        # A tie in the clean image's logits is a margin of 0; the mean of a random model's may be below it.
        clean = np.maximum(tally.clean_margins[left], np.finfo(np.float32).tiny)
        reached = tally.reached[[tally.arms.index(stage) for stage in stages]][:, left]
        lowest = np.fmin.accumulate(np.concatenate([tally.before[None, left], reached[:-1]]))
        broken = tally.fell[left] == np.array(stages)[:, None]
        return Evidence(
            left=np.clip(lowest / clean, 0, 1),
            now=np.clip(tally.margins[left] / clean, 0, 1),
            gains=np.where(broken, np.inf, (lowest - reached) / clean),
            standing=tally.fell[left] == STANDS,
            keys=sample_ids([tally.images[at] for at in left]).numpy(),
            drawn=np.isin(left, list(drawn)),
            costs=np.array([attack.budget(classes, norm) * (1 if attack.blind else 2) for attack in attacks]),
            priors=[PRIORS[attack.info.access] for attack in attacks],
            allowed=allowed(self.strictness, n),
        )


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
