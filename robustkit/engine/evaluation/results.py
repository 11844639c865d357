"""The results of a run so far, summed over its ledger's chunks: which images are robust and what fooled others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from robustkit.core.flags import Flag
from robustkit.registry.decorators import stage_name
from robustkit.runs.distances import Minimum
from robustkit.runs.evaluation_record import Report
from robustkit.runs.ledger import Chunk
from robustkit.runs.report_parts import Cost, Draws, Outcome, Passes, Rate, Stage, Stop, Strictness
from robustkit.runs.spec import RunSpec

ROBUST = np.iinfo(np.int64).max
# The chunk of the clean stage that holds the flags of the checks.
CHECKING = -1


class Hashes:
    """The sha256 of the image at each position, as hex digits; kept as 32 bytes."""

    def __init__(self, n: int) -> None:
        """Allocate n zero digests."""
        self._bytes = np.zeros((n, 32), np.uint8)

    def __getitem__(self, position: int) -> str:
        return bytes(self._bytes[position]).hex()

    def digests(self, positions: np.ndarray) -> list[str]:
        """Return the digests of these positions."""
        return [row.tobytes().hex() for row in self._bytes[positions]]

    def __setitem__(self, position: int, digest: str) -> None:
        self._bytes[position] = np.frombuffer(bytes.fromhex(digest), np.uint8)


@dataclass
class RunResults:
    """Results of `n` images. Stage 0 is the clean pass, stage i the suite's i-th attack.

    Attributes:
        n: how many images.
        names: of the stages.
        spare: conditional stages, which are reported only if they ran.
        arms: stages that run on some of the images only.
        chunks: (stage, number) of the chunks so far.
        stopped: why a run ended early; None for others.
        fooled_at: the stage that fooled each image; ROBUST for the others.
        labels, predictions, clean_margins, images: of the clean pass; `images` are sha256 digests.
        margins: the lowest so far.
        before: the lowest margin in the stages before the arms.
        reached: the lowest margin in each arm's attack (A n), NaN where it did not run.
        judged: the last stage with a verdict, -1 for none.
        right, once, confirmed: of a random model, the lowest share of correct draws, whether the first draw there
            was correct, and whether further draws decided any verdict.
        distances: of the fooling image from the clean one, for minimum norms.
        costs: of each stage.
        checks: passes of the checks, which are part of the clean stage.
        flags, passed: raised and not raised, by code.
        scope: the positions that count: all images, or those of finished blocks in a run that may stop early.
    """

    n: int
    names: list[str]
    conditional: frozenset[int] = frozenset()
    arms: Sequence[int] = ()
    chunks: set[tuple[int, int]] = field(default_factory=set)
    stopped: Stop | None = None

    def __post_init__(self) -> None:
        """Allocate the arrays."""
        self.fooled_at = np.full(self.n, ROBUST)
        self.labels = np.zeros(self.n, np.int64)
        self.predictions = np.zeros(self.n, np.int64)
        self.margins = np.full(self.n, np.inf)
        self.clean_margins = np.full(self.n, np.inf)
        self.before = np.full(self.n, np.inf)
        self.reached = np.full((len(self.arms), self.n), np.nan)
        self.judged = np.full(self.n, -1)
        self.right = np.full(self.n, np.nan)
        self.once = np.zeros(self.n, bool)
        self.confirmed = np.zeros(self.n, bool)
        self.distances = np.full(self.n, np.inf)
        self.images = Hashes(self.n)
        self.costs = [Cost(0, 0, 0.0) for _ in self.names]
        self.checks = Passes(0, 0)
        self.flags: dict[str, Flag] = {}
        self.passed: dict[str, Flag] = {}
        self.scope = np.arange(self.n)

    @classmethod
    def of(cls, n: int, suite: Sequence[Mapping[str, Any]]) -> RunResults:
        """Return empty results of a run on n images with this suite in its spec."""
        conditional = frozenset(number for number, record in enumerate(suite, 1) if record.get("spare"))
        arms = [number for number, record in enumerate(suite, 1) if record.get("arm")]
        return cls(n, ["clean", *map(stage_name, suite)], conditional, arms)

    def add(self, chunk: Chunk) -> None:
        """Add a chunk. Any order gives the same results."""
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
            position = verdict.position
            if chunk.stage == 0:
                self.labels[position], self.predictions[position] = verdict.label, verdict.prediction
                self.images[position], self.clean_margins[position] = verdict.image, verdict.margin
            if verdict.fooled:
                self.fooled_at[position] = chunk.stage
                self.distances[position] = 0.0 if verdict.distance is None else verdict.distance
            self.margins[position] = min(self.margins[position], verdict.margin)
            if chunk.stage in self.arms:
                self.reached[self.arms.index(chunk.stage), position] = verdict.margin
            elif not self.arms or chunk.stage < self.arms[0]:
                self.before[position] = min(self.before[position], verdict.margin)
            self.judged[position] = max(self.judged[position], chunk.stage)
            if verdict.right is not None and not verdict.right >= self.right[position]:
                self.right[position], self.once[position] = verdict.right, bool(verdict.once)
            self.confirmed[position] |= bool(verdict.struck)
        for flag in chunk.flags:
            self.raise_flag(flag)

    def raise_flag(self, flag: Flag) -> None:
        """Keep one flag of each code with the values summed, and apart those that are not raised."""
        if not flag.raised:
            self.passed[flag.code] = flag
            return
        known = self.flags.get(flag.code)
        if known is not None and known.value is not None and flag.value is not None:
            flag = replace(flag, value=known.value + flag.value)
        self.flags[flag.code] = flag

    def waiting(self, stage: int, positions: np.ndarray) -> np.ndarray:
        """Return which of these positions no earlier stage fooled and have no verdict from this stage on.

        For an arm: which are robust and have no verdict from it.
        """
        if stage in self.arms:
            reached = self.reached[self.arms.index(stage), positions]
            mask = (self.fooled_at[positions] == ROBUST) & np.isnan(reached)
        else:
            mask = (self.fooled_at[positions] >= stage) & (self.judged[positions] < stage)
        left: np.ndarray = positions[mask]
        return left

    def next_chunk(self, stage: int) -> int:
        """Return the number of the stage's next chunk."""
        return 1 + max((number for position, number in self.chunks if position == stage), default=-1)

    def unfinished(self, positions: np.ndarray, last: int) -> int:
        """Return how many of these images are robust without a verdict from stage `last` yet."""
        return int(((self.fooled_at[positions] == ROBUST) & (self.judged[positions] < last)).sum())

    @property
    def robust(self) -> int:
        """How many images in scope are robust so far."""
        return int((self.fooled_at[self.scope] == ROBUST).sum())

    @property
    def settled(self) -> int:
        """How many images have their final verdict: fooled, or robust after each unconditional stage."""
        last = max(stage for stage in range(len(self.names)) if stage not in {*self.conditional, *self.arms})
        return int(((self.fooled_at != ROBUST) | (self.judged >= last)).sum())

    @property
    def seen(self) -> np.ndarray:
        """The positions of the images with any verdict, in scope or not."""
        return np.flatnonzero(self.judged >= 0)

    def _rate(self, hits: int, n: int, stage: int) -> Rate:
        if self.stopped is None:
            return Rate.of(hits, n)
        # The clean pass is known of all images.
        return Rate.anytime(hits, n, self.stopped.unfinished if stage else 0)

    @property
    def reported(self) -> list[int]:
        """The numbers of the stages that a report lists."""
        return [n for n, cost in enumerate(self.costs) if cost.forwards or n not in self.conditional]

    def stages(self, positions: np.ndarray) -> list[Stage]:
        """Return each stage's result on these images, the clean pass first, with its cost on all images."""
        fooled_at, reported = self.fooled_at[positions], set(self.reported)
        return [
            Stage(
                name,
                self._rate(int((fooled_at > number).sum()), len(positions), number),
                int((fooled_at == number).sum()),
                self.costs[number].forwards,
                self.costs[number].backwards,
                self.costs[number].seconds,
            )
            for number, name in enumerate(self.names)
            if number in reported
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
        """Return the record of the finished run; `flags` come after those of the chunks."""
        raised = [flag for flag in flags if flag.raised]
        passed = [flag for flag in flags if flag not in raised]
        stages = self.stages(self.scope)
        if spec.minimal:
            # The attacks run together: all have the accuracy after all of them.
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
            flags=[*self.flags.values(), *raised],
            verdicts=[
                Outcome(
                    index=position,
                    label=int(self.labels[position]),
                    clean_prediction=int(self.predictions[position]),
                    robust=bool(self.fooled_at[position] == ROBUST),
                    attack=None if self.fooled_at[position] == ROBUST else self.names[self.fooled_at[position]],
                    margin=float(self.margins[position]),
                )
                for position in sorted(self.scope.tolist())
            ],
            environment=environment,
            files=files,
            passed=[*self.passed.values(), *passed],
            draws=self._draws(),
            checks=self.checks,
            stopped=self.stopped,
            minimum=self._minimum() if spec.minimal else None,
            strictness=strictness,
            adversarial=adversarial,
        )

    def _minimum(self) -> Minimum:
        """Return the distance of each image's nearest fooling image; 0 where the clean image is misclassified."""
        distances = np.where(self.fooled_at == 0, 0.0, self.distances)[np.sort(self.scope)]
        return Minimum.of([value if np.isfinite(value) else None for value in distances.tolist()])

    def _draws(self) -> Draws | None:
        """Return the accuracies by one draw, on average and by majority of a random model; None for others."""
        right = self.right[self.scope]
        if np.isnan(right).any():
            return None
        inside = (self.fooled_at[self.scope] > 0) & ~self.confirmed[self.scope]
        return Draws(
            one=self._rate(int(self.once[self.scope].sum()), len(self.scope), len(self.names) - 1),
            mean=float(right.mean()),
            majority=self._rate(self.robust, len(self.scope), len(self.names) - 1),
            gap=float(right.mean() - inside.mean()),
        )
