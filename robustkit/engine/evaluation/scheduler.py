"""The driver of a run with several workers: it hands out samples, collects verdicts and writes them down.

Verdicts do not depend on who gives them: a sample's numbers are its own, and attacks whose numbers depend on the
batch get the batches of a run with one worker. A random model's draws are each worker's own.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from robustkit.attack_api import RowWise
from robustkit.distributed.company import Member
from robustkit.distributed.crew import Agency
from robustkit.distributed.model_files import Parcelled
from robustkit.distributed.process_pool import Hiring
from robustkit.engine.batching.row_batch import RowBatch
from robustkit.engine.batching.saved_rows import SavedRows
from robustkit.engine.evaluation import tasks
from robustkit.engine.evaluation.block_runner import BlockRunner
from robustkit.engine.evaluation.early_stopping import TimeUp
from robustkit.engine.evaluation.tasks import Brief, Gone, Parcel
from robustkit.engine.model.instrumented_model import MAX_TRIAL_BATCH
from robustkit.runs.ledger import Chunk

# A worker gets no more at once than this share of its part of the queue, so that the last go out one by one.
SHARES = 2
# Samples that a worker must have before others are given some of them, and seconds between two attempts.
WORTH_SPLITTING = 4
SPLIT_EVERY = 0.5
# What workers notice on their flights that adds up; of the rest the record has what they agree on, or all of it.
SUMS = ("claims_refused", "searched_again")


@dataclass
class Scheduler(BlockRunner):
    """Does clean pass and checks itself and has the attacks done by workers, hired while it does them."""

    def __post_init__(self) -> None:
        """Begin with nobody hired and nothing landed."""
        super().__post_init__()
        self.facts: dict[tuple[int, int], Mapping[str, Any]] = {}
        self.finished: list[Chunk] = []

    @contextmanager
    def hired(self, agency: Agency) -> Iterator[None]:
        """Have workers inside."""
        with agency.crew(self._briefing()) as self.crew:
            yield

    def _briefing(self) -> Callable[[Hiring, int], Brief]:
        """Return what says all that the worker of a number has to know."""
        model = Parcelled.of(self.instrumented.model)
        images = self.samples.images(range(min(MAX_TRIAL_BATCH, len(self.samples)))).numpy()

        def brief(hiring: Hiring, number: int) -> Brief:
            return Brief(
                number=number,
                model=model,
                device=hiring.device(self.instrumented.device, number),
                threads=hiring.threads,
                precision=self.settings.precision,
                suite=self.settings.suite,
                threat=str(self.settings.threat),
                seed=self.settings.seed,
                batch=self.settings.batch_size,
                slots=self.slots,
                most=self.settings.max_slots,
                free=self.settings.choose_precision,
                random=self.instrumented.random,
                data=self.samples.name,
                labels=self.samples.labels,
                images=images,
                store=self.store,
            )

        return brief

    def run_clean(self, among: np.ndarray) -> None:
        """Have the clean pass done by workers where there is more than a batch for each; do the checks."""
        parts = self._chunks(0, among)
        if self.crew.sole and len(parts) > self.crew.count:
            self.progress.stage("clean", len(among), self.results.robust, self.results.n)
            self._hand_out(0, parts)
        super().run_clean(among)

    def run_row_wise(self, first: int, count: int, among: np.ndarray) -> None:
        """Have what still stands of these taken through `count` attacks by whoever has slots free."""
        waiting = self.results.waiting(first, among)
        self.progress.stage(self._title(first, count), len(waiting), self.results.robust, self.results.n)
        saved = deque(self._saved(first, waiting.tolist()))
        queue = deque(sorted(set(waiting.tolist()).difference(*(positions for _, positions in saved))))
        split = 0.0
        for member, message in self._talk(first, count, lambda: bool(queue or saved) or self._splittable):
            if isinstance(message, Gone):
                again = list(self._saved(first, member.held, member.saved_as))
                saved.extend(again)
                queue.extendleft(member.held.difference(*(positions for _, positions in again)))
            elif isinstance(message, tasks.Want):
                most = max(1, len(queue) // (SHARES * self.crew.count))
                positions = [queue.popleft() for _ in range(min(message.free, most, len(queue)))]
                member.held.update(positions)
                member.tell(tasks.Boarded(self._parcel(positions), bool(queue)))
            elif isinstance(message, tasks.Given):
                member.asked = False
                member.held.difference_update(message.positions)
                taker = next(iter(self.crew.idle), None)
                if taker is None:
                    queue.extendleft(message.positions)
                elif message.positions:
                    taker.held.update(message.positions)
                    parcel = self._parcel(message.positions, with_images=False)
                    self._begin(taker, first, count, parcel=parcel, active=message.active)
            for idle in self.crew.idle:
                if saved:
                    name, positions = saved.popleft()
                    idle.held.update(positions)
                    self._begin(idle, first, count, name, self._parcel(positions))
                elif queue:
                    self._begin(idle, first, count)
            if not queue and self.crew.idle and time.perf_counter() - split > SPLIT_EVERY:
                split = time.perf_counter()
                self._split()

    def _begin(
        self,
        member: Member,
        first: int,
        count: int,
        name: str = "",
        parcel: Parcel | None = None,
        active: Sequence[tuple[int, RowBatch]] = (),
    ) -> None:
        """Order a flight, which saves what it has under way by this name or a new one."""
        member.saved_as = name or f"{self.task_name(first)}-{time.time_ns()}"
        member.begin(tasks.Fly(first, count, self.results.flags, member.saved_as, parcel, active))

    def _saved(self, first: int, waiting: Collection[int], name: str = "") -> Iterator[tuple[str, list[int]]]:
        """Yield names of flights that were saved and those of these samples that each has, none of them twice."""
        left, own = set(waiting), self.task_name(first)
        for saved in [name] if name else self.store.names(own):
            state = self.store.state(saved) if saved == own or saved.startswith(f"{own}-") else None
            if state is not None and (positions := SavedRows.positions_in(state) & left):
                left -= positions
                yield saved, sorted(positions)

    @property
    def _splittable(self) -> bool:
        return any(len(member.held) >= WORTH_SPLITTING for member in self.crew.members)

    def _split(self) -> None:
        """Ask the worker with most on board to give some of them to one that has nothing."""
        most = max(self.crew.members, key=lambda member: len(member.held), default=None)
        if most and len(most.held) >= WORTH_SPLITTING and not most.asked:
            most.asked = True
            most.tell(tasks.Split())

    def run_attack(self, stage: int, among: np.ndarray) -> None:
        """Have one attack run over what still stands of these, in the batches of a run with one worker."""
        self._announce(stage, among)
        self._hand_out(stage, self._chunks(stage, among))

    def _hand_out(self, stage: int, batches: Sequence[tuple[int, np.ndarray]]) -> None:
        """Have each of these chunks done by whoever is free."""
        parts = deque(batches)
        given: dict[int, tuple[int, np.ndarray]] = {}
        for member, message in self._talk(stage, 1, lambda: bool(parts)):
            if isinstance(message, Gone) and member.held:
                parts.appendleft(given[member.number])
            for idle in self.crew.idle[: len(parts)]:
                given[idle.number] = number, positions = parts.popleft()
                idle.held.update(positions.tolist())
                idle.begin(tasks.Block(stage, number, self._parcel(positions.tolist())))

    def _talk(self, first: int, count: int, left: Callable[[], bool]) -> Iterator[tuple[Member, object]]:
        """Yield what the crew says until nothing is `left` for others and all of it is there and written down.

        Each worker that has nothing to do is yielded at the start. Of one that has died the caller takes back what
        it held.
        """
        written, done = time.perf_counter(), 0
        yield from [(member, tasks.Idle()) for member in self.crew.idle]
        # One that has landed all it had may still ask for more, and has facts to tell.
        while (more := left()) or any(member.ordered for member in self.crew.members):
            self.crew.more = more
            for member, message in self.crew.hear():
                if isinstance(message, tasks.Done):
                    done += self._land(member, message.chunks)
                    self.crew.deaths = 0
                elif isinstance(message, tasks.Under):
                    member.done = message.done
                elif isinstance(message, tasks.Idle):
                    self.facts[member.number, member.stint] = message.facts
                    member.rest()
                elif isinstance(message, tasks.Ready):
                    # Nobody has worked while all were loading the model.
                    written = written if any(other.held for other in self.crew.members) else time.perf_counter()
                yield member, message
            now = time.perf_counter()
            whole = bool(self.finished) and not self._flies(first)
            if whole or now - written > self.write_every or now > self.deadline:
                self._write(first, count, now - written)
                written = now
            under_way = sum(max(member.done - member.finished, 0) for member in self.crew.members)
            self.progress.advance(done + under_way, self.results.robust)
            if now > self.deadline:
                raise TimeUp
        self.crew.more = False
        self._write(first, count, time.perf_counter() - written)
        self.search_facts = {**_agreed(list(self.facts.values())), "workers": self.crew.total}

    def _land(self, member: Member, chunks: Sequence[Chunk]) -> int:
        """Keep what a worker has done until it is written; return of how many samples."""
        self.finished += chunks
        positions = [verdict.position for chunk in chunks for verdict in chunk.verdicts]
        member.held.difference_update(positions)
        member.finished += len(positions)
        return len(positions)

    def _flies(self, stage: int) -> bool:
        row_wise = stage > 0 and isinstance(self.settings.entries[stage - 1].attack, RowWise)
        return row_wise and not self.settings.threat.minimal

    def _write(self, first: int, count: int, seconds: float) -> None:
        """Write down what has landed in so many seconds, which the stages share by their passes."""
        if not self.finished:
            return
        finished, self.finished = self.finished, []
        total = max(sum(chunk.forwards + chunk.backwards for chunk in finished), 1)
        if self._flies(first):
            number = self.results.next_chunk(first)
            finished = [_sum(stage, number, finished) for stage in range(first, first + count)]
        chunks = [
            replace(chunk, seconds=seconds * (chunk.forwards + chunk.backwards) / total) for chunk in finished
        ]
        self.writer.write(*chunks)

    def _parcel(self, positions: Sequence[int], with_images: bool = True) -> Parcel:
        index = np.array(positions, np.int64)
        images = self.samples.images(index).numpy() if with_images else None
        known = self.results.judged[index] >= 0
        hashes = [self.results.images[at] for at in positions] if known.all() else []
        margins = np.stack([self.results.clean_margins[index], self.results.margins[index]], 1)
        return Parcel(index, images, hashes, margins)


def _sum(stage: int, number: int, chunks: Sequence[Chunk]) -> Chunk:
    """Return the chunks of a stage as one."""
    mine = [chunk for chunk in chunks if chunk.stage == stage]
    return Chunk(
        stage,
        number,
        sum(chunk.forwards for chunk in mine),
        sum(chunk.backwards for chunk in mine),
        0.0,
        [verdict for chunk in mine for verdict in chunk.verdicts],
        [flag for chunk in mine for flag in chunk.flags],
    )


def _agreed(facts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what workers noticed as the facts of one run."""
    found: dict[str, Any] = {}
    for name in dict.fromkeys(name for of in facts for name in of):
        values = [of[name] for of in facts if of.get(name) is not None]
        if name in SUMS:
            found[name] = sum(values)
        elif name == "occupancy":
            found[name] = sum(values) / len(values) if values else None
        else:
            distinct = list(dict.fromkeys(values))
            # A command that leaves it open is the one that repeats a run of several precisions.
            several = "auto" if name == "precision" else distinct
            found[name] = distinct[0] if len(distinct) == 1 else several
    return found
