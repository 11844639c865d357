"""The sum of a ledger's chunks so far: who stands, who fell to what, at what cost; and the report of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from robustkit.core.flags import Flag
from robustkit.registry.decorators import stage_name
from robustkit.runs.distances import Minimum
from robustkit.runs.evaluation_record import (
    Cost,
    Draws,
    Outcome,
    Passes,
    Rate,
    Report,
    RunSpec,
    Stage,
    Stop,
    Strictness,
)
from robustkit.runs.ledger import Chunk

STANDS = np.iinfo(np.int64).max
# The number of the clean stage's chunk that holds what the checks found.
CHECKING = -1


class Hashes:
    """A sha256 in hex for each position, kept as 32 bytes."""

    def __init__(self, n: int) -> None:
        """Begin with noughts."""
        self._bytes = np.zeros((n, 32), np.uint8)

    def __getitem__(self, position: int) -> str:
        return bytes(self._bytes[position]).hex()

    def __setitem__(self, position: int, digest: str) -> None:
        self._bytes[position] = np.frombuffer(bytes.fromhex(digest), np.uint8)


@dataclass
class RunResults:
    """Counts over `n` samples. Stage 0 is the clean pass; a sample's `fell` is the stage that settled it.

    `judged` is the last stage that a sample has a verdict from. `spare` are stages that are told of only where
    they were needed; `arms` are stages that are for some of the samples only. `scope` are the positions that
    count: all, but for a run that may stop early, which says in `stopped` that it has. `before` is the lowest
    margin of a sample in the stages before the arms, `reached` (A n) the lowest in each arm's own attack, and NaN
    where it has not met that arm.
    """

    n: int
    names: list[str]
    spare: frozenset[int] = frozenset()
    arms: Sequence[int] = ()
    chunks: set[tuple[int, int]] = field(default_factory=set)
    stopped: Stop | None = None

    def __post_init__(self) -> None:
        """Begin with nothing known."""
        self.fell = np.full(self.n, STANDS)
        self.labels = np.zeros(self.n, np.int64)
        self.predictions = np.zeros(self.n, np.int64)
        self.margins = np.full(self.n, np.inf)
        self.clean_margins = np.full(self.n, np.inf)
        self.before = np.full(self.n, np.inf)
        self.reached = np.full((len(self.arms), self.n), np.nan)
        self.judged = np.full(self.n, -1)
        self.right = np.full(self.n, np.nan)
        self.once = np.zeros(self.n, bool)
        self.struck = np.zeros(self.n, bool)
        self.distances = np.full(self.n, np.inf)
        self.images = Hashes(self.n)
        self.costs = [Cost(0, 0, 0.0) for _ in self.names]
        self.checks = Passes(0, 0)
        self.flags: dict[str, Flag] = {}
        self.passed: dict[str, Flag] = {}
        self.scope = np.arange(self.n)

    @classmethod
    def of(cls, n: int, suite: Sequence[Mapping[str, Any]]) -> RunResults:
        """Return a new one of a run with this suite in its spec."""
        spare = frozenset(number for number, record in enumerate(suite, 1) if record.get("spare"))
        arms = [number for number, record in enumerate(suite, 1) if record.get("arm")]
        return cls(n, ["clean", *map(stage_name, suite)], spare, arms)

    def add(self, chunk: Chunk) -> None:
        """Take a chunk in. Any order gives the same sum."""
        self.chunks.add((chunk.stage, chunk.chunk))
        cost = self.costs[chunk.stage]
        self.costs[chunk.stage] = Cost(
            cost.forwards + chunk.forwards,
            cost.backwards + chunk.backwards,
            cost.seconds + chunk.seconds,
        )
        if (chunk.stage, chunk.chunk) == (0, CHECKING):
            self.checks = Passes(chunk.forwards, chunk.backwards)
        for verdict in chunk.verdicts:
            at = verdict.position
            if chunk.stage == 0:
                self.labels[at], self.predictions[at] = verdict.label, verdict.prediction
                self.images[at], self.clean_margins[at] = verdict.image, verdict.margin
            if verdict.fooled:
                self.fell[at] = chunk.stage
                self.distances[at] = 0.0 if verdict.distance is None else verdict.distance
            self.margins[at] = min(self.margins[at], verdict.margin)
            if chunk.stage in self.arms:
                self.reached[self.arms.index(chunk.stage), at] = verdict.margin
            elif not self.arms or chunk.stage < self.arms[0]:
                self.before[at] = min(self.before[at], verdict.margin)
            self.judged[at] = max(self.judged[at], chunk.stage)
            if verdict.right is not None and not verdict.right >= self.right[at]:
                self.right[at], self.once[at] = verdict.right, bool(verdict.once)
            self.struck[at] |= bool(verdict.struck)
        for flag in chunk.flags:
            self.raise_flag(flag)

    def raise_flag(self, flag: Flag) -> None:
        """Keep one flag of each code, with the values added up; and apart, what checks say that raised none."""
        if not flag.raised:
            self.passed[flag.code] = flag
            return
        known = self.flags.get(flag.code)
        if known is not None and known.value is not None and flag.value is not None:
            flag = replace(flag, value=known.value + flag.value)
        self.flags[flag.code] = flag

    def waiting(self, stage: int, among: np.ndarray) -> np.ndarray:
        """Return which of these positions no earlier stage settled and have no verdict from this one on.

        Of an arm: which still stand and have not met it.
        """
        if stage in self.arms:
            mask = (self.fell[among] == STANDS) & np.isnan(self.reached[self.arms.index(stage), among])
        else:
            mask = (self.fell[among] >= stage) & (self.judged[among] < stage)
        left: np.ndarray = among[mask]
        return left

    def next_chunk(self, stage: int) -> int:
        """Return the number of the stage's next chunk."""
        return 1 + max((chunk for of, chunk in self.chunks if of == stage), default=-1)

    def unfinished(self, among: np.ndarray, last: int) -> int:
        """Return how many of these positions are not fooled and have not met all attacks up to stage `last`."""
        return int(((self.fell[among] == STANDS) & (self.judged[among] < last)).sum())

    @property
    def robust(self) -> int:
        """How many samples in scope nothing has fooled yet."""
        return int((self.fell[self.scope] == STANDS).sum())

    @property
    def settled(self) -> int:
        """How many samples have their verdict: fooled ones, and those that withstood every stage of all runs."""
        last = max(stage for stage in range(len(self.names)) if stage not in {*self.spare, *self.arms})
        return int(((self.fell != STANDS) | (self.judged >= last)).sum())

    @property
    def seen(self) -> np.ndarray:
        """The positions of the samples that have been looked at at all, in scope or not yet."""
        return np.flatnonzero(self.judged >= 0)

    def _rate(self, hits: int, n: int, stage: int) -> Rate:
        if self.stopped is None:
            return Rate.of(hits, n)
        # What the clean pass says is known of all.
        return Rate.anytime(hits, n, self.stopped.unfinished if stage else 0)

    @property
    def told(self) -> list[int]:
        """The numbers of the stages that a report tells of."""
        return [n for n, cost in enumerate(self.costs) if cost.forwards or n not in self.spare]

    def stages(self, among: np.ndarray) -> list[Stage]:
        """Return what each stage did to these positions, the clean pass first; what it cost is that of all."""
        fell = self.fell[among]
        return [
            Stage(
                name,
                self._rate(int((fell > number).sum()), len(among), number),
                int((fell == number).sum()),
                self.costs[number].forwards,
                self.costs[number].backwards,
                self.costs[number].seconds,
            )
            for number, name in enumerate(self.names)
            if number in self.told
        ]

    def report(
        self,
        spec: RunSpec,
        flags: list[Flag],
        environment: Mapping[str, Any],
        files: Mapping[str, str],
        strictness: Strictness | None = None,
        adversarial: Mapping[str, Any] | None = None,
    ) -> Report:
        """Return the finished run's record; `flags` come after those of the chunks."""
        found = [*self.flags.values(), *self.passed.values(), *flags]
        stages = self.stages(self.scope)
        if spec.minimal:
            # What an attack leaves is told by the nearest images of all.
            stages[1:] = [replace(stage, robust_accuracy=stages[-1].robust_accuracy) for stage in stages[1:]]
        return Report(
            run_id=spec.run_id,
            spec=spec,
            n=len(self.scope),
            clean_accuracy=stages[0].robust_accuracy,
            robust_accuracy=stages[-1].robust_accuracy,
            stages=stages,
            cost=Cost(
                sum(cost.forwards for cost in self.costs),
                sum(cost.backwards for cost in self.costs),
                sum(cost.seconds for cost in self.costs),
            ),
            flags=[flag for flag in found if flag.raised],
            verdicts=[
                Outcome(
                    index=at,
                    label=int(self.labels[at]),
                    clean_prediction=int(self.predictions[at]),
                    robust=bool(self.fell[at] == STANDS),
                    attack=None if self.fell[at] == STANDS else self.names[self.fell[at]],
                    margin=float(self.margins[at]),
                )
                for at in sorted(self.scope.tolist())
            ],
            environment=environment,
            files=files,
            passed=[flag for flag in found if not flag.raised],
            draws=self._draws(),
            checks=self.checks,
            stopped=self.stopped,
            minimum=self._minimum() if spec.minimal else None,
            strictness=strictness,
            adversarial=adversarial,
        )

    def _minimum(self) -> Minimum:
        """Return how far the nearest fooling image of each image is; 0 where the clean pass settled it."""
        far = np.where(self.fell == 0, 0.0, self.distances)[np.sort(self.scope)]
        return Minimum.of([value if np.isfinite(value) else None for value in far.tolist()])

    def _draws(self) -> Draws | None:
        """Return what a random model's draws say; None of another."""
        right = self.right[self.scope]
        if np.isnan(right).any():
            return None
        inside = (self.fell[self.scope] > 0) & ~self.struck[self.scope]
        return Draws(
            one=self._rate(int(self.once[self.scope].sum()), len(self.scope), len(self.names) - 1),
            mean=float(right.mean()),
            majority=self._rate(self.robust, len(self.scope), len(self.names) - 1),
            gap=float(right.mean() - inside.mean()),
        )
