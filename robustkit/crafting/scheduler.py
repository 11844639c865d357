"""A craft run's images made by workers: batch by batch, by whoever is free, into the driver's ledger."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import numpy as np

from robustkit.crafting.batches import MAX_POOL, Goals
from robustkit.crafting.image_store import ResumableCrafter
from robustkit.crafting.spec import CraftRequest
from robustkit.distributed.crew import Agency, Crew
from robustkit.distributed.model_files import Parcelled
from robustkit.distributed.process_pool import Hiring
from robustkit.engine.evaluation import tasks
from robustkit.engine.model.loaded_models import Net
from robustkit.engine.progress import Progress
from robustkit.runs.ledger import Chunk, Ledger
from robustkit.runs.unfinished_work import Store


class DistributedCrafter(ResumableCrafter):
    """A workshop whose images others make: the batches of one process, each whole, so that they come out the same.

    A random model's draws are each worker's own.
    """

    def __init__(
        self, plan: CraftRequest, ledger: Ledger, progress: Progress, store: Store, agency: Agency
    ) -> None:
        """Hire nobody yet."""
        super().__init__(plan, ledger, progress, store)
        self.agency = agency
        self._hired = ExitStack()
        self._crew: Crew | None = None

    @property
    def crew(self) -> Crew:
        """The workers, hired when first asked for."""
        if self._crew is None:
            self._crew = self._hired.enter_context(self.agency.crew(self._briefing()))
        return self._crew

    def close(self) -> None:
        """Let the workers go."""
        self._hired.close()

    def _briefing(self) -> Callable[[Hiring, int], tasks.CraftBrief]:
        plan, storage = self.plan, self.ensemble.storage
        models = [_parcelled(net, plan) for net in plan.nets]
        pool = self.samples.images(np.arange(min(MAX_POOL, self.n))).numpy()

        def brief(hiring: Hiring, number: int) -> tasks.CraftBrief:
            return tasks.CraftBrief(
                number=number,
                nets=[replace(net, model=None) for net in plan.nets],
                models=models,
                loaded=storage.loaded,
                held=storage.held,
                ways=self.ensemble.configs,
                device=hiring.device(plan.device, number),
                threads=min(hiring.threads, max(net.threads for net in plan.nets)),
                threat=str(plan.threat),
                attack=plan.attack,
                combine=plan.combine,
                weights=plan.weights,
                seed=plan.seed,
                batch=self.batch,
                data=self.samples.name,
                labels=self.samples.labels,
                pool=pool,
                store=self.store,
            )

        return brief

    def craft(
        self,
        stage: int,
        attack: Any,
        members: Sequence[int] | None,
        goals: Goals,
        parts: Sequence[np.ndarray],
    ) -> Iterator[Chunk]:
        """Yield these parts of a stage as chunks, as they come; seconds are the driver's."""
        queue, written = deque(parts), time.perf_counter()
        while queue or any(member.ordered for member in self.crew.members):
            for idle in self.crew.idle[: len(queue)]:
                at = queue.popleft()
                idle.begin(self._order(stage, attack, members, goals, at))
                idle.held.update(at.tolist())
            self.crew.more = bool(queue)
            for member, message in self.crew.hear():
                if isinstance(message, tasks.Gone) and member.held:
                    queue.appendleft(np.array(sorted(member.held), np.int64))
                elif isinstance(message, tasks.Idle):
                    member.rest()
                elif isinstance(message, tasks.Done):
                    self.crew.deaths = 0
                    for chunk in message.chunks:
                        member.held.difference_update(verdict.position for verdict in chunk.verdicts)
                        now = time.perf_counter()
                        yield replace(chunk, seconds=now - written)
                        written = now
        self.crew.more = False

    def _order(
        self, stage: int, attack: Any, members: Sequence[int] | None, goals: Goals, at: np.ndarray
    ) -> tasks.Make:
        wanted = None if goals is None else {place: goals[place] for place in at.tolist()}
        return tasks.Make(stage, attack, members, wanted, at, self.samples.images(at).numpy())


def _parcelled(net: Net, plan: CraftRequest) -> Parcelled:
    """Return a surrogate packed for workers; only one from Python is needed itself."""
    if net.string.startswith("python:"):
        return Parcelled.of(net.load(plan.device))
    return Parcelled.named(net, net.classes)
