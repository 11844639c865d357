"""Continuous batching: one batch of slots in which samples go through a row of attacks, each at its own pace.

Every step is one forward and backward pass for all rows that want a gradient, whatever their attack, target or
iteration, and one forward pass for those that do not. A row that seems to succeed is judged in float32 at once:
if that holds the sample leaves, if not it goes on. A sample does one job at a time, in an order that only its own
past decides; so its verdict does not depend on who else is on board.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from robustkit.attack_api import Answer, Rows, rank
from robustkit.core import losses
from robustkit.core.criteria import Goal
from robustkit.core.rng import RowRng
from robustkit.core.shapes import Images, Labels, Logits, PerRow
from robustkit.core.threat import ThreatModel, per_row
from robustkit.engine.batching.attack_queue import AttackQueue
from robustkit.engine.batching.forward_passes import Query, answers, looks
from robustkit.engine.batching.row_batch import RowBatch
from robustkit.engine.batching.samples import Admitted, Finished
from robustkit.engine.evaluation.verdicts import Verdicts, judge
from robustkit.engine.model.instrumented_model import InstrumentedModel
from robustkit.engine.model.random_refinement import STEPS, choose_eot_view, refine_with_eot
from robustkit.gradient_views.discovery import is_applicable
from robustkit.gradient_views.views import MEAN_DRAWS
from robustkit.registry import SuiteEntry

T = TypeVar("T")

# Draws by which the nearest point of one attack is compared with that of the next, where a model is random.
WEIGHED = 16


@dataclass
class ContinuousBatch:
    """Takes samples through consecutive attacks; iterate over `run()`.

    `board(n)` gives up to n samples; fewer mean that no more will come, unless they say so.
    `mend` is told of a pass that failed: it raises, or puts things right for another try. `pace` is how many steps
    may pass between two looks at the device. `wide` flights do all jobs of an attack at a sample at once, where
    others do so in the last resorts alone: fewer steps for few samples. Where the model is `steady`, giving one
    answer to an image, an attempt's last query is made in float32 at once, and that answer is the verdict on it.
    `suite` names the views that the whole suite attacks.
    """

    instrumented: InstrumentedModel
    threat: ThreatModel
    entries: Sequence[SuiteEntry]
    streams: Sequence[str]
    seed: int
    slots: int
    admit: Callable[[int], Admitted]
    mend: Callable[[Exception], None]
    pace: int = 1
    wide: bool = False
    steady: bool = False
    suite: Collection[str] = ()
    steps: int = 0
    filled: int = 0
    refused: int = 0
    finished: list[Finished] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Open a lane for each attack."""
        ways = enumerate(zip(self.entries, self.streams, strict=True))
        norm = self.threat.norm
        self.queues = [AttackQueue.of(entry, stream, at, norm, wide=self.wide) for at, (entry, stream) in ways]
        self.more = True

    @property
    def active(self) -> int:
        """How many samples are under way."""
        return sum(len(queue.batch) for queue in self.queues if queue.batch is not None)

    @property
    def under_way(self) -> float:
        """What those aboard amount to in whole samples, by the attack that each is at."""
        at = ((queue, len(np.unique(queue.batch.host["position"]))) for queue in self.queues if queue.batch)
        return sum((queue.number + 0.5) / len(self.queues) * samples for queue, samples in at)

    @property
    def occupancy(self) -> float | None:
        """The mean share of slots in use while samples were waiting; None if none ever was."""
        return self.filled / (self.steps * self.slots) if self.steps else None

    def run(self) -> Iterator[list[Finished]]:
        """Yield after every look at the device what has landed since, until all have."""
        while True:
            self._fill()
            busy = [queue for queue in self.queues if queue.batch is not None]
            if busy:
                nearest = min(int((queue.options.steps - queue.active.host["age"]).min()) for queue in busy) + 1
                for _ in range(min(self.pace, nearest)):
                    if self.more:
                        self.steps += 1
                        self.filled += self.active
                    for query, answer, deployed in self._tried(partial(self._ask, busy)):
                        self._charge(query, answer)
                        self._advance(query, answer, deployed)
                self._look(busy)
            finished, self.finished = self.finished, []
            yield finished
            if not busy and not finished:
                return

    def _fill(self) -> None:
        while self.more and (free := self.slots - self.active) > 0:
            position, ids, x, labels, clean, nearest, later = self.admit(free)
            self.more = later or len(position) == free
            if not len(position):
                return
            clean, nearest = clean.double(), nearest.double()
            low = torch.full_like(clean, -torch.inf)
            most = max(queue.options.targets for queue in self.queues)
            tensors = {
                "ids": ids,
                "x": x,
                "labels": labels,
                "past": torch.stack([clean, nearest], 1),
                "nearest": clean,
                "best": x,
                "anchor": x,
                "refused": low,
                "claimed": torch.zeros_like(low, dtype=torch.bool),
                "when": torch.zeros_like(low, dtype=torch.int64),
                "ended": torch.zeros_like(low, dtype=torch.bool),
                "broken": torch.zeros_like(low, dtype=torch.bool),
                "claim": x,
                "claim_logits": x.new_full((len(x), self.instrumented.num_classes or 2), torch.nan),
                "ranked": labels.new_full((len(x), min(most, (self.instrumented.num_classes or 2) - 1)), -1),
            }
            zero = np.zeros(len(position), np.int64)
            spent = np.zeros((len(position), len(self.queues), 2), np.int64)
            self._enter(0, RowBatch({"position": position, "job": zero, "age": zero, "spent": spent}, tensors))
            if later and len(position) < free:
                return

    def take(self, active: Sequence[tuple[int, RowBatch]]) -> None:
        """Take over samples that another flight of the same attacks gave away: lanes by number, and their rows."""
        for number, batch in active:
            self.queues[number].join(batch)

    def state(self) -> list[dict[str, Any]]:
        """Return a record of each lane's rows, and of those parked, between two steps."""
        rows = [(queue.number, *pair) for queue in self.queues for pair in enumerate((queue.batch, queue.parked))]
        return [{"lane": number, "parked": parked, **of.record()} for number, parked, of in rows if of is not None]

    def resume(self, queue: int, parked: int, batch: RowBatch) -> None:
        """Take over rows of a lane, or rows that are parked there."""
        if parked:
            self.queues[queue].parked = batch
        else:
            self.queues[queue].join(batch)

    def give(self) -> list[tuple[int, RowBatch]]:
        """Give away every other sample aboard, in the middle of what it is at; not those that are many rows."""
        given = []
        for queue in self.queues:
            if queue.batch is None or queue.wide or len(queue.batch) < 2:
                continue
            rows = np.arange(len(queue.batch))
            given.append((queue.number, queue.batch.select(rows[1::2])))
            queue.batch = queue.batch.select(rows[::2])
        return given

    def _enter(self, number: int, batch: RowBatch) -> None:
        """Begin the attack of that number on these samples, or a later one, or land them."""
        if number == len(self.queues):
            return self._arrive(batch)
        queue = self.queues[number]
        absent = not is_applicable(queue.view, self.instrumented.views, self.suite)
        share = queue.options.boundary_only
        luck = queue.options.score_check and self.instrumented.random
        if absent or luck or (share is not None and self.instrumented.rounding):
            return self._enter(number + 1, batch)
        self._weigh(batch)
        clean, past = batch.device["past"].unbind(1)
        batch.device["past"] = torch.stack([clean, torch.maximum(past, batch.device["nearest"])], 1)
        batch.host["job"] = np.zeros(len(batch), np.int64)
        near = None if share is None else self._rows(queue, batch.with_state({})).near_boundary(share)
        if near is not None:
            mask = near.cpu().numpy()
            if not mask.all():
                self._enter(number + 1, batch.select(np.flatnonzero(~mask)))
                batch = batch.select(np.flatnonzero(mask))
        if not len(batch):
            return None
        if queue.options.targets and bool((batch.device["ranked"][:, 0] < 0).any()):
            logits = self._tried(lambda: self.instrumented.logits_fp32(batch.device["x"]))
            batch.device["ranked"] = rank(logits, batch.device["labels"], batch.device["ranked"].shape[1])
            batch.host["spent"][:, number, 0] += 1
        self._launch(queue, batch.spread(queue.jobs(self.instrumented)) if queue.wide else batch)
        return None

    def _launch(self, queue: AttackQueue, batch: RowBatch) -> None:
        """Begin a job of each row."""
        batch.host["age"] = np.zeros(len(batch), np.int64)
        batch.device["ended"] = torch.zeros_like(batch.device["ended"])
        batch = batch.with_state({})
        batch = batch.with_state(queue.attack.init(self._rows(queue, batch)))
        queue.join(batch)

    def _rows(self, queue: AttackQueue, batch: RowBatch) -> Rows:
        part, device = batch.device, batch.device["x"].device
        job, age = (torch.from_numpy(batch.host[name]).to(device) for name in ("job", "age"))
        goal = Goal(part["labels"])
        aim = goal
        if queue.options.targets:
            target = job % queue.attempts(self.instrumented) // queue.options.restarts
            aim = Goal(part["labels"], part["ranked"].gather(1, target[:, None])[:, 0])
        rng = RowRng(self.seed, queue.stream, part["ids"], restart=job, step=age)
        return Rows(part["x"], goal, self.threat, rng, aim, part["past"], part["best"])

    def _tried(self, work: Callable[[], T]) -> T:
        """Do what asks the model and changes nothing else, again where a failure could be mended."""
        while True:
            try:
                return work()
            except (RuntimeError, MemoryError) as error:
                self.mend(error)

    def _ask(self, queues: Sequence[AttackQueue]) -> list[tuple[Query, Answer, Logits]]:
        """Return an answer for every row, with the model's own logits: all lanes together that can share."""
        queries = [Query.of(queue, self._rows(queue, queue.active), steady=self.steady) for queue in queues]
        return answers(queries, self.instrumented)

    def _charge(self, query: Query, answer: Answer) -> None:
        """Put the passes that an answer took on the account of each row."""
        queue = query.queue
        spent, job = queue.active.host["spent"], queue.active.host["job"]
        part = job // queue.attempts(self.instrumented) if queue.view else 0 * job
        passes = queue.options.eot_samples * np.array(self.instrumented.passes(queue.view))[part]
        spent[:, queue.number, 0] += passes + looks(queue.view, random=self.instrumented.random)
        spent[:, queue.number, 1] += np.where(query.needs_gradient.numpy(), passes * answer.loss[0].numel(), 0)

    def _advance(self, query: Query, answer: Answer, deployed: Logits) -> None:
        """Note what the model's answers say, claims among it, and go one step on by those of the view."""
        queue, exact = query.queue, query.exact.to(answer.logits.device)
        batch = queue.active
        part, state = batch.device, batch.state
        score = losses.margin(deployed, part["labels"]).double()
        if queue.options.queries_outside_ball:
            score = torch.where(self.threat.contains(state["x"], part["x"]), score, -torch.inf)
        nearer = score > part["nearest"]
        part["best"] = torch.where(per_row(nearer, part["x"]), state["x"], part["best"])
        part["nearest"] = torch.where(nearer, score, part["nearest"])
        part["broken"] = part["broken"] | ~deployed.isfinite().all(1)
        # Where the search is in low precision a point may fool the float32 model before the search can see it.
        doubt = torch.where(exact, 0, self.instrumented.rounding * deployed.abs().amax(1).double())
        seems = Goal(part["labels"]).reached(deployed) & (score > -torch.inf) | (score > -doubt)
        claims = seems & (score > part["refused"]) & ~part["claimed"] & ~part["ended"]
        part["claim"] = torch.where(per_row(claims, part["x"]), state["x"], part["claim"])
        answers = torch.where(exact[:, None], deployed, torch.nan)
        part["claim_logits"] = torch.where(claims[:, None], answers, part["claim_logits"])
        part["claimed"] = part["claimed"] | claims
        age = torch.from_numpy(batch.host["age"]).to(claims.device)
        part["when"] = torch.where(claims, age, part["when"])
        if "last" in state:
            part["ended"] = part["ended"] | state["last"]
        batch.host["age"] = batch.host["age"] + 1
        queue.batch = batch.with_state(queue.attack.step(self._rows(queue, batch), state, answer))

    def _look(self, queues: Sequence[AttackQueue]) -> None:
        """Judge the claims; land the fooled, give the others whose job is over their next one."""
        claims = [queue.active.device["claimed"].cpu().numpy().nonzero()[0] for queue in queues]
        verdicts = self._judge([queue.active.select(index) for queue, index in zip(queues, claims, strict=True)])
        moves: list[tuple[int, RowBatch]] = []
        for queue, index, judged in zip(queues, claims, verdicts, strict=True):
            batch = queue.active
            done = (batch.host["age"] > queue.options.steps) | batch.device["ended"].cpu().numpy()
            gone = np.zeros(len(batch), bool)
            if judged is not None:
                batch.host["spent"][index, queue.number, 0] += judged.forwards.cpu().numpy()
                fooled = judged.fooled.cpu().numpy()
                again = torch.from_numpy(index[~fooled]).to(batch.device["x"].device)
                self.refused += len(again)
                part = batch.device
                part["refused"][again] = part["nearest"][again]
                part["claimed"] = torch.zeros_like(part["claimed"])
                if fooled.any():
                    gone = self._leave(queue, index[fooled], judged.select(fooled))
            over = done & ~gone
            if not (gone | over).any():
                continue
            following = over & (batch.host["job"] + 1 < (0 if queue.wide else queue.jobs(self.instrumented)))
            staying = ~(gone | over)
            queue.batch = batch.select(np.flatnonzero(staying)) if staying.any() else None
            if following.any():
                next_job = batch.select(np.flatnonzero(following))
                next_job.host["job"] = next_job.host["job"] + 1
                self._launch(queue, next_job)
            if (over & ~following).any():
                leaving = batch.select(np.flatnonzero(over & ~following)).with_state({})
                leaving = queue.complete(leaving) if queue.wide else leaving
                if len(leaving):
                    moves.append((queue.number + 1, leaving))
        for number, batch in moves:
            self._enter(number, batch)

    def _leave(self, queue: AttackQueue, index: np.ndarray, judged: Verdicts) -> np.ndarray:
        """Land the fooled rows' samples, each by its earliest claim; return which rows go with them."""
        batch = queue.active
        position, claimed = batch.host["position"], batch.device["when"].cpu().numpy()[index]
        order = np.lexsort((batch.host["job"][index], claimed, position[index]))
        samples, first = np.unique(position[index][order], return_index=True)
        winners = order[first]
        mask = np.zeros(len(index), bool)
        mask[winners] = True
        landing = batch.select(index[mask])
        gone = np.isin(position, samples)
        if queue.wide:
            every = queue.with_parked(batch.select(np.flatnonzero(gone)).with_state({}), samples).folded()
            at = np.searchsorted(every.host["position"], landing.host["position"])
            landing.host["spent"] = every.host["spent"][at]
        self._land(landing, queue.number, self._deepened(queue, landing, judged.select(mask)))
        return gone

    def _judge(self, batches: list[RowBatch]) -> list[Verdicts | None]:
        """Judge the claims of several lanes in one pass."""
        some = [batch for batch in batches if len(batch)]
        if not some:
            return [None] * len(batches)
        names = ("x", "labels", "claim", "claim_logits")
        x, labels, claim, known = (torch.cat([t.device[name] for t in some]) for name in names)
        judged = self._tried(lambda: judge(self.instrumented, x, labels, claim, self.threat, known))
        found: list[Verdicts | None] = []
        at = 0
        for batch in batches:
            part = np.zeros(len(x), bool)
            part[at : at + len(batch)] = True
            found.append(judged.select(part) if len(batch) else None)
            at += len(batch)
        return found

    def _weigh(self, batch: RowBatch) -> None:
        """Of a random model keep the nearest point by the mean of fresh draws, not by the luckiest of many."""
        if not self.instrumented.random:
            return
        part = batch.device
        moved = (part["best"] != part["anchor"]).flatten(1).any(1).nonzero()[:, 0]
        if not len(moved):
            return
        points = torch.stack([part["anchor"][moved], part["best"][moved]])
        scores = self._mean_margin(points.flatten(0, 1), part["labels"][moved].repeat(2)).view(2, -1)
        score, better = scores.max(0)
        nearest = torch.where(per_row(better > 0, points[1]), points[1], points[0])
        part["best"] = part["best"].index_copy(0, moved, nearest)
        part["anchor"], part["nearest"] = part["best"], part["nearest"].index_copy(0, moved, score)
        part["refused"] = torch.minimum(part["refused"], part["nearest"])
        self._bill(batch, moved.cpu().numpy(), 2 * WEIGHED)

    def _bill(self, batch: RowBatch, index: np.ndarray, forwards: int | np.ndarray) -> None:
        """Put forwards on the account of the last attack that these rows were in."""
        ran = batch.host["spent"][index, :, 0] > 0
        last = np.where(ran.any(1), ran.shape[1] - 1 - ran[:, ::-1].argmax(1), 0)
        batch.host["spent"][index, last, 0] += forwards

    def _mean_margin(self, point: Images, labels: Labels) -> PerRow:
        """Return how far points are beyond the boundary, on the mean of fresh draws."""

        def margin() -> Tensor:
            return losses.margin(self.instrumented.logits_fp32(point), labels).double()

        found = torch.stack([self._tried(margin) for _ in range(WEIGHED)]).mean(0)
        return torch.where(found.isnan(), -torch.inf, found)

    def _deepened(self, queue: AttackQueue, landing: RowBatch, judged: Verdicts) -> Verdicts:
        """Of a random model go on from points where it is right at times, and judge those that come further."""
        view = choose_eot_view(queue.view, self.instrumented.views)
        usable = queue.options.needs_gradient and (view or self.instrumented.differentiable)
        if not (self.instrumented.random and usable):
            return judged
        open_rows = (judged.right > 0).nonzero()[:, 0]
        if not len(open_rows):
            return judged
        passes = self.instrumented.passes(view)[0] if view else MEAN_DRAWS
        x, labels, point = (of[open_rows] for of in (landing.device["x"], landing.device["labels"], judged.x))
        answer = self.instrumented.view(view) if view else self.instrumented.mean
        further = self._tried(lambda: refine_with_eot(answer, x, labels, point, self.threat))
        better = self._mean_margin(further, labels) > self._mean_margin(point, labels)
        told = self._tried(lambda: judge(self.instrumented, x, labels, further, self.threat))
        better = better & told.fooled
        # Here the sample lands and the host waits for its verdict anyway.
        index, spent = open_rows.cpu().numpy(), landing.host["spent"][:, queue.number]
        spent[index] += STEPS * passes
        spent[index, 0] += 2 * WEIGHED + told.forwards.cpu().numpy()
        return judged.replaced(open_rows[better], told.select(better.cpu().numpy()))

    def _arrive(self, batch: RowBatch) -> None:
        """Land what has withstood everything, judged at its best point."""
        self._weigh(batch)
        part = batch.device
        judged = self._tried(
            lambda: judge(self.instrumented, part["x"], part["labels"], part["best"], self.threat)
        )
        self._bill(batch, np.arange(len(batch)), judged.forwards.cpu().numpy())
        self._land(batch, len(self.queues) - 1, judged)

    def _land(self, batch: RowBatch, stage: int, judged: Verdicts) -> None:
        if len(batch):
            at = np.full(len(batch), stage)
            labels = batch.device["labels"].cpu().numpy()
            judged = replace(judged, broken=judged.broken | batch.device["broken"] & ~judged.fooled)
            if self.instrumented.random:
                judged = replace(judged, refused=~judged.fooled & (batch.device["refused"] > -torch.inf))
            self.finished.append(Finished(batch.host["position"], labels, at, batch.host["spent"], judged))
