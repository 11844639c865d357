"""A craft run's images crafted by workers, batch by batch, into the driver's ledger."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import numpy as np

from robustkit.crafting import craft_worker
from robustkit.crafting.batches import MAX_POOL, Goals
from robustkit.crafting.craft_worker import CraftBatch, CraftJob
from robustkit.crafting.image_store import ResumableCrafter
from robustkit.crafting.spec import CraftRequest
from robustkit.distributed.pool import Task, WorkerPool
from robustkit.distributed.sent_files import send_files
from robustkit.distributed.sent_models import SentModel
from robustkit.distributed.sharing import SharedPool, Team, Worker, shared_pool
from robustkit.engine.evaluation.tasks import Data, Result
from robustkit.engine.model.loaded_models import Net
from robustkit.engine.progress import Progress
from robustkit.runs.ledger import Chunk, Ledger
from robustkit.runs.unfinished_work import Store

# Fields of a request that workers get; the others are lists of models and images, or the driver's.
REQUEST = ("threat", "attack", "combine", "weights", "seed", "deterministic")


class DistributedCrafter(ResumableCrafter):
    """A crafter whose images workers craft: the batches of one process, each whole, so that images are the same.

    A random model's draws are each worker's own.
    """

    def __init__(
        self, plan: CraftRequest, ledger: Ledger, progress: Progress, store: Store, pool: SharedPool | None
    ) -> None:
        """Prepare; workers start on first use."""
        super().__init__(plan, ledger, progress, store)
        self.pool = pool
        self._stack = ExitStack()

    @cached_property
    def team(self) -> Team:
        """The workers, which start on first use."""
        plan, samples, storage = self.plan, self.samples, self.ensemble.storage
        shared = self.pool or self._stack.enter_context(shared_pool(plan.workers, plan.ray, self.progress.say))
        models = [_sent(shared.pool, net, plan) for net in plan.nets]
        images = samples.images(np.arange(min(MAX_POOL, self.n))).numpy()
        data = shared.pool.share(Data(samples.name, samples.labels, images, None, samples.rows), "the data")

        def load(worker: Worker) -> Task[bool]:
            job = CraftJob(
                nets=[replace(net, model=None) for net in plan.nets],
                models=models,
                storage=storage,
                configs=self.ensemble.configs,
                data=data,
                request={name: getattr(plan, name) for name in REQUEST},
                batch=self.batch,
                device=shared.pool.device(plan.device, worker.slot),
                processes=shared.pool.processes_per_device(plan.device),
                threads=min(shared.pool.threads, max(net.threads for net in plan.nets)),
                store=self.store,
            )
            return partial(craft_worker.load, job)

        return self._stack.enter_context(shared.team(load))

    def close(self) -> None:
        """Release the workers."""
        self._stack.close()

    def craft(
        self,
        stage: int,
        attack: Any,
        members: Sequence[int] | None,
        goals: Goals,
        parts: Sequence[np.ndarray],
    ) -> Iterator[Chunk]:
        """Yield these parts of a stage as chunks, as they are done; seconds are the driver's."""

        def task(worker: Worker, positions: np.ndarray) -> Task[Result]:
            chosen = None if goals is None else {position: goals[position] for position in positions.tolist()}
            images = self.samples.images(positions).numpy()
            return partial(craft_worker.craft, CraftBatch(stage, attack, members, chosen, positions, images))

        written = time.perf_counter()
        for finished in self.team.run_parts(deque(parts), task):
            for _, result in finished:
                self.team.deaths = 0
                for message in result.messages:
                    self.progress.say(message)
                for chunk in result.chunks:
                    now = time.perf_counter()
                    yield replace(chunk, seconds=now - written)
                    written = now


def _sent(pool: WorkerPool, net: Net, plan: CraftRequest) -> SentModel:
    """Return a surrogate for workers; only one from Python is needed itself."""
    if net.string.startswith("python:"):
        return SentModel.of(pool, net.load(plan.device))
    return SentModel(net.string, net.fingerprint, net.trust_code, net.classes, send_files(pool, net.string))
