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

from robustkit.attack_api.row_wise import Answer, Rows, rank
from robustkit.core import losses
from robustkit.core.criteria import Goal
from robustkit.core.rng import RowRng
from robustkit.core.shapes import Images, Labels, Logits, PerRow
from robustkit.core.threat import ThreatModel, per_row
from robustkit.engine.batching.attack_queue import AttackQueue
from robustkit.engine.batching.forward_passes import Query, answers, looks
from robustkit.engine.batching.row_batch import RowBatch
from robustkit.engine.batching.samples import Admitted, Finished
from robustkit.engine.evaluation.verdicts import Judged, judge
from robustkit.engine.model.instrumented_model import InstrumentedModel
from robustkit.engine.model.random_refinement import STEPS, choose_eot_view, refine_with_eot
from robustkit.gradient_views.discovery import is_applicable
from robustkit.gradient_views.views import DRAWS
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

    meter: InstrumentedModel
    threat: ThreatModel
    rungs: Sequence[SuiteEntry]
    streams: Sequence[str]
    seed: int
    slots: int
    board: Callable[[int], Admitted]
    mend: Callable[[Exception], None]
    pace: int = 1
    wide: bool = False
    steady: bool = False
    suite: Collection[str] = ()
    steps: int = 0
    filled: int = 0
    refused: int = 0
    landed: list[Finished] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Open a lane for each attack."""
        ways = enumerate(zip(self.rungs, self.streams, strict=True))
        norm = self.threat.norm
        self.lanes = [AttackQueue.of(rung, stream, at, norm, wide=self.wide) for at, (rung, stream) in ways]
        self.more = True

    @property
    def aboard(self) -> int:
        """How many samples are under way."""
        return sum(len(lane.table) for lane in self.lanes if lane.table is not None)

    @property
    def under_way(self) -> float:
        """What those aboard amount to in whole samples, by the attack that each is at."""
        at = ((lane, len(np.unique(lane.table.host["position"]))) for lane in self.lanes if lane.table)
        return sum((lane.number + 0.5) / len(self.lanes) * samples for lane, samples in at)

    @property
    def occupancy(self) -> float | None:
        """The mean share of slots in use while samples were waiting; None if none ever was."""
        return self.filled / (self.steps * self.slots) if self.steps else None

    def run(self) -> Iterator[list[Finished]]:
        """Yield after every look at the device what has landed since, until all have."""
        while True:
            self._fill()
            busy = [lane for lane in self.lanes if lane.table is not None]
            if busy:
                nearest = min(int((lane.length - lane.aboard.host["age"]).min()) for lane in busy) + 1
                for _ in range(min(self.pace, nearest)):
                    if self.more:
                        self.steps += 1
                        self.filled += self.aboard
                    for query, answer, deployed in self._tried(partial(self._ask, busy)):
                        self._charge(query, answer)
                        self._advance(query, answer, deployed)
                self._look(busy)
            landed, self.landed = self.landed, []
            yield landed
            if not busy and not landed:
                return

    def _fill(self) -> None:
        while self.more and (free := self.slots - self.aboard) > 0:
            position, ids, x, labels, clean, nearest, later = self.board(free)
            self.more = later or len(position) == free
            if not len(position):
                return
            clean, nearest = clean.double(), nearest.double()
            low = torch.full_like(clean, -torch.inf)
            most = max(lane.targets for lane in self.lanes)
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
                "claim_logits": x.new_full((len(x), self.meter.num_classes or 2), torch.nan),
                "ranked": labels.new_full((len(x), min(most, (self.meter.num_classes or 2) - 1)), -1),
            }
            zero = np.zeros(len(position), np.int64)
            spent = np.zeros((len(position), len(self.lanes), 2), np.int64)
            self._enter(0, RowBatch({"position": position, "job": zero, "age": zero, "spent": spent}, tensors))
            if later and len(position) < free:
                return

    def take(self, aboard: Sequence[tuple[int, RowBatch]]) -> None:
        """Take over samples that another flight of the same attacks gave away: lanes by number, and their rows."""
        for number, table in aboard:
            self.lanes[number].join(table)

    def state(self) -> list[dict[str, Any]]:
        """Return a record of each lane's rows, and of those parked, between two steps."""
        rows = [(lane.number, *pair) for lane in self.lanes for pair in enumerate((lane.table, lane.parked))]
        return [{"lane": number, "parked": parked, **of.record()} for number, parked, of in rows if of is not None]

    def resume(self, lane: int, parked: int, table: RowBatch) -> None:
        """Take over rows of a lane, or rows that are parked there."""
        if parked:
            self.lanes[lane].parked = table
        else:
            self.lanes[lane].join(table)

    def give(self) -> list[tuple[int, RowBatch]]:
        """Give away every other sample aboard, in the middle of what it is at; not those that are many rows."""
        given = []
        for lane in self.lanes:
            if lane.table is None or lane.wide or len(lane.table) < 2:
                continue
            rows = np.arange(len(lane.table))
            given.append((lane.number, lane.table.select(rows[1::2])))
            lane.table = lane.table.select(rows[::2])
        return given

    def _enter(self, number: int, table: RowBatch) -> None:
        """Begin the attack of that number on these samples, or a later one, or land them."""
        if number == len(self.lanes):
            return self._arrive(table)
        lane = self.lanes[number]
        absent = not is_applicable(lane.view, self.meter.views, self.suite)
        luck = lane.attack.second_opinion and self.meter.random
        if absent or luck or (lane.attack.last_resort and self.meter.rounding):
            return self._enter(number + 1, table)
        self._weigh(table)
        clean, past = table.device["past"].unbind(1)
        table.device["past"] = torch.stack([clean, torch.maximum(past, table.device["nearest"])], 1)
        table.host["job"] = np.zeros(len(table), np.int64)
        willing = lane.attack.enters(self._rows(lane, table.with_state({})))
        if willing is not None:
            mask = willing.cpu().numpy()
            if not mask.all():
                self._enter(number + 1, table.select(np.flatnonzero(~mask)))
                table = table.select(np.flatnonzero(mask))
        if not len(table):
            return None
        if lane.targets and bool((table.device["ranked"][:, 0] < 0).any()):
            logits = self._tried(lambda: self.meter.exact(table.device["x"]))
            table.device["ranked"] = rank(logits, table.device["labels"], table.device["ranked"].shape[1])
            table.host["spent"][:, number, 0] += 1
        self._launch(lane, table.spread(lane.jobs(self.meter)) if lane.wide else table)
        return None

    def _launch(self, lane: AttackQueue, table: RowBatch) -> None:
        """Begin a job of each row."""
        table.host["age"] = np.zeros(len(table), np.int64)
        table.device["ended"] = torch.zeros_like(table.device["ended"])
        table = table.with_state({})
        table = table.with_state(lane.attack.init(self._rows(lane, table)))
        lane.join(table)

    def _rows(self, lane: AttackQueue, table: RowBatch) -> Rows:
        part, device = table.device, table.device["x"].device
        job, age = (torch.from_numpy(table.host[name]).to(device) for name in ("job", "age"))
        goal = Goal(part["labels"])
        aim = goal
        if lane.targets:
            aim = Goal(
                part["labels"],
                part["ranked"].gather(1, (job % lane.attempts(self.meter) // lane.restarts)[:, None])[:, 0],
            )
        rng = RowRng(self.seed, lane.stream, part["ids"], restart=job, step=age)
        return Rows(part["x"], goal, self.threat, rng, aim, part["past"], part["best"])

    def _tried(self, work: Callable[[], T]) -> T:
        """Do what asks the model and changes nothing else, again where a failure could be mended."""
        while True:
            try:
                return work()
            except (RuntimeError, MemoryError) as error:
                self.mend(error)

    def _ask(self, lanes: Sequence[AttackQueue]) -> list[tuple[Query, Answer, Logits]]:
        """Return an answer for every row, with the model's own logits: all lanes together that can share."""
        queries = [Query.of(lane, self._rows(lane, lane.aboard), steady=self.steady) for lane in lanes]
        return answers(queries, self.meter)

    def _charge(self, query: Query, answer: Answer) -> None:
        """Put the passes that an answer took on the account of each row."""
        lane = query.lane
        spent, job = lane.aboard.host["spent"], lane.aboard.host["job"]
        part = job // lane.attempts(self.meter) if lane.view else 0 * job
        passes = lane.attack.draws * np.array(self.meter.passes(lane.view))[part]
        spent[:, lane.number, 0] += passes + looks(lane.view, random=self.meter.random)
        spent[:, lane.number, 1] += np.where(query.blind.numpy(), 0, passes * answer.loss[0].numel())

    def _advance(self, query: Query, answer: Answer, deployed: Logits) -> None:
        """Note what the model's answers say, claims among it, and go one step on by those of the view."""
        lane, exact = query.lane, query.exact.to(answer.logits.device)
        table = lane.aboard
        part, state = table.device, table.state
        score = losses.margin(deployed, part["labels"]).double()
        if lane.attack.strays:
            score = torch.where(self.threat.contains(state["x"], part["x"]), score, -torch.inf)
        nearer = score > part["nearest"]
        part["best"] = torch.where(per_row(nearer, part["x"]), state["x"], part["best"])
        part["nearest"] = torch.where(nearer, score, part["nearest"])
        part["broken"] = part["broken"] | ~deployed.isfinite().all(1)
        # Where the search is in low precision a point may fool the float32 model before the search can see it.
        doubt = torch.where(exact, 0, self.meter.rounding * deployed.abs().amax(1).double())
        seems = Goal(part["labels"]).reached(deployed) & (score > -torch.inf) | (score > -doubt)
        claims = seems & (score > part["refused"]) & ~part["claimed"] & ~part["ended"]
        part["claim"] = torch.where(per_row(claims, part["x"]), state["x"], part["claim"])
        answers = torch.where(exact[:, None], deployed, torch.nan)
        part["claim_logits"] = torch.where(claims[:, None], answers, part["claim_logits"])
        part["claimed"] = part["claimed"] | claims
        age = torch.from_numpy(table.host["age"]).to(claims.device)
        part["when"] = torch.where(claims, age, part["when"])
        if "last" in state:
            part["ended"] = part["ended"] | state["last"]
        table.host["age"] = table.host["age"] + 1
        lane.table = table.with_state(lane.attack.step(self._rows(lane, table), state, answer))

    def _look(self, lanes: Sequence[AttackQueue]) -> None:
        """Judge the claims; land the fooled, give the others whose job is over their next one."""
        claims = [lane.aboard.device["claimed"].cpu().numpy().nonzero()[0] for lane in lanes]
        verdicts = self._judge([lane.aboard.select(index) for lane, index in zip(lanes, claims, strict=True)])
        moves: list[tuple[int, RowBatch]] = []
        for lane, index, judged in zip(lanes, claims, verdicts, strict=True):
            table = lane.aboard
            done = (table.host["age"] > lane.length) | table.device["ended"].cpu().numpy()
            gone = np.zeros(len(table), bool)
            if judged is not None:
                table.host["spent"][index, lane.number, 0] += judged.forwards.cpu().numpy()
                fooled = judged.fooled.cpu().numpy()
                again = torch.from_numpy(index[~fooled]).to(table.device["x"].device)
                self.refused += len(again)
                part = table.device
                part["refused"][again] = part["nearest"][again]
                part["claimed"] = torch.zeros_like(part["claimed"])
                if fooled.any():
                    gone = self._leave(lane, index[fooled], judged.select(fooled))
            over = done & ~gone
            if not (gone | over).any():
                continue
            following = over & (table.host["job"] + 1 < (0 if lane.wide else lane.jobs(self.meter)))
            staying = ~(gone | over)
            lane.table = table.select(np.flatnonzero(staying)) if staying.any() else None
            if following.any():
                next_job = table.select(np.flatnonzero(following))
                next_job.host["job"] = next_job.host["job"] + 1
                self._launch(lane, next_job)
            if (over & ~following).any():
                leaving = table.select(np.flatnonzero(over & ~following)).with_state({})
                leaving = lane.complete(leaving) if lane.wide else leaving
                if len(leaving):
                    moves.append((lane.number + 1, leaving))
        for number, table in moves:
            self._enter(number, table)

    def _leave(self, lane: AttackQueue, index: np.ndarray, judged: Judged) -> np.ndarray:
        """Land the fooled rows' samples, each by its earliest claim; return which rows go with them."""
        table = lane.aboard
        position, claimed = table.host["position"], table.device["when"].cpu().numpy()[index]
        order = np.lexsort((table.host["job"][index], claimed, position[index]))
        samples, first = np.unique(position[index][order], return_index=True)
        winners = order[first]
        mask = np.zeros(len(index), bool)
        mask[winners] = True
        landing = table.select(index[mask])
        gone = np.isin(position, samples)
        if lane.wide:
            every = lane.with_parked(table.select(np.flatnonzero(gone)).with_state({}), samples).folded()
            at = np.searchsorted(every.host["position"], landing.host["position"])
            landing.host["spent"] = every.host["spent"][at]
        self._land(landing, lane.number, self._deepened(lane, landing, judged.select(mask)))
        return gone

    def _judge(self, tables: list[RowBatch]) -> list[Judged | None]:
        """Judge the claims of several lanes in one pass."""
        some = [table for table in tables if len(table)]
        if not some:
            return [None] * len(tables)
        names = ("x", "labels", "claim", "claim_logits")
        x, labels, claim, known = (torch.cat([t.device[name] for t in some]) for name in names)
        judged = self._tried(lambda: judge(self.meter, x, labels, claim, self.threat, known))
        found: list[Judged | None] = []
        at = 0
        for table in tables:
            part = np.zeros(len(x), bool)
            part[at : at + len(table)] = True
            found.append(judged.select(part) if len(table) else None)
            at += len(table)
        return found

    def _weigh(self, table: RowBatch) -> None:
        """Of a random model keep the nearest point by the mean of fresh draws, not by the luckiest of many."""
        if not self.meter.random:
            return
        part = table.device
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
        self._bill(table, moved.cpu().numpy(), 2 * WEIGHED)

    def _bill(self, table: RowBatch, index: np.ndarray, forwards: int | np.ndarray) -> None:
        """Put forwards on the account of the last attack that these rows were in."""
        ran = table.host["spent"][index, :, 0] > 0
        last = np.where(ran.any(1), ran.shape[1] - 1 - ran[:, ::-1].argmax(1), 0)
        table.host["spent"][index, last, 0] += forwards

    def _mean_margin(self, point: Images, labels: Labels) -> PerRow:
        """Return how far points are beyond the boundary, on the mean of fresh draws."""

        def margin() -> Tensor:
            return losses.margin(self.meter.exact(point), labels).double()

        found = torch.stack([self._tried(margin) for _ in range(WEIGHED)]).mean(0)
        return torch.where(found.isnan(), -torch.inf, found)

    def _deepened(self, lane: AttackQueue, landing: RowBatch, judged: Judged) -> Judged:
        """Of a random model go on from points where it is right at times, and judge those that come further."""
        view = choose_eot_view(lane.view, self.meter.views)
        if not self.meter.random or lane.attack.blind or not (view or self.meter.differentiable):
            return judged
        open_rows = (judged.right > 0).nonzero()[:, 0]
        if not len(open_rows):
            return judged
        passes = self.meter.passes(view)[0] if view else DRAWS
        x, labels, point = (of[open_rows] for of in (landing.device["x"], landing.device["labels"], judged.x))
        answer = self.meter.through(view) if view else self.meter.mean
        further = self._tried(lambda: refine_with_eot(answer, x, labels, point, self.threat))
        better = self._mean_margin(further, labels) > self._mean_margin(point, labels)
        told = self._tried(lambda: judge(self.meter, x, labels, further, self.threat))
        better = better & told.fooled
        # Here the sample lands and the host waits for its verdict anyway.
        index, spent = open_rows.cpu().numpy(), landing.host["spent"][:, lane.number]
        spent[index] += STEPS * passes
        spent[index, 0] += 2 * WEIGHED + told.forwards.cpu().numpy()
        return judged.replaced(open_rows[better], told.select(better.cpu().numpy()))

    def _arrive(self, table: RowBatch) -> None:
        """Land what has withstood everything, judged at its best point."""
        self._weigh(table)
        part = table.device
        judged = self._tried(lambda: judge(self.meter, part["x"], part["labels"], part["best"], self.threat))
        self._bill(table, np.arange(len(table)), judged.forwards.cpu().numpy())
        self._land(table, len(self.lanes) - 1, judged)

    def _land(self, table: RowBatch, stage: int, judged: Judged) -> None:
        if len(table):
            at = np.full(len(table), stage)
            labels = table.device["labels"].cpu().numpy()
            judged = replace(judged, broken=judged.broken | table.device["broken"] & ~judged.fooled)
            if self.meter.random:
                judged = replace(judged, refused=~judged.fooled & (table.device["refused"] > -torch.inf))
            self.landed.append(Finished(table.host["position"], labels, at, table.host["spent"], judged))
