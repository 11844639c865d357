"""Crafts adversarial images on a craft run's surrogates, batch by batch."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

from robustkit.attack_api import Surrogates
from robustkit.core.criteria import Goal
from robustkit.core.determinism import deterministic_operations
from robustkit.core.devices import ComputeDevice
from robustkit.core.errors import RunError
from robustkit.core.isolation import own_randomness
from robustkit.core.out_of_memory import NO_MEMORY, try_in_memory
from robustkit.core.rng import RowRng
from robustkit.core.shapes import Images
from robustkit.crafting.ensemble import Ensemble, Storage
from robustkit.crafting.spec import CraftRequest
from robustkit.data.prefetch import read_ahead
from robustkit.engine.progress import Progress
from robustkit.models.failures import described
from robustkit.runs.ledger import Chunk, Verdict
from robustkit.runs.recorded_outputs import recording
from robustkit.runs.unfinished_work import Store

BATCH_CPU, BATCH_GPU = 64, 256
# The most images of the run that techniques may mix into others.
MAX_POOL = 256
# The target classes by position; None for an untargeted attack.
Goals = Sequence[int] | Mapping[int, int] | None


class Crafter:
    """Crafts images on surrogates; an out-of-memory error halves the batch."""

    def __init__(self, plan: CraftRequest, progress: Progress, store: Store) -> None:
        """Prepare; surrogates are loaded on first use, and the store keeps unfinished batches."""
        self.plan, self.progress, self.store = plan, progress, store
        self.samples, self.threat = plan.samples, plan.threat
        self.n = len(plan.samples)
        self.batch = min(
            plan.batch_size or (BATCH_CPU if ComputeDevice(plan.device).is_cpu else BATCH_GPU), self.n
        )
        self._ensemble: Ensemble | None = None

    def note(self, configs: str) -> str:
        """Return the execution configs (JSON) to use, given those chosen now."""
        return configs

    @property
    def ensemble(self) -> Ensemble:
        """The surrogates, loaded and tuned on first use."""
        if self._ensemble is None:
            plan = self.plan
            storage = Storage.of(plan.nets, self.batch, plan.device, plan.streaming)
            self._ensemble = Ensemble(plan.nets, plan.device, storage, plan.combine, plan.weights)
            x = self.samples.images(np.arange(self.batch)).to(plan.device)
            # In eval mode: trials in training mode would change running statistics.
            with self._ensemble.in_eval_mode(), recording(self.store, "tune"):
                self._ensemble.tune(x, self.note, hooked=self._hooked())
        return self._ensemble

    def use_ensemble(self, ensemble: Ensemble, configs: Mapping[str, Any]) -> None:
        """Use these surrogates with execution configs chosen by another process."""
        self._ensemble = ensemble
        with ensemble.in_eval_mode():
            ensemble.apply_configs(
                dict(configs), self.samples.images(np.arange(min(MAX_POOL, self.n))).to(self.plan.device)
            )

    def surrogates(self, members: Sequence[int] | None = None) -> Surrogates:
        """Return all surrogates or some, with the run's first images for techniques that mix images."""
        pool = self.samples.images(np.arange(min(MAX_POOL, self.n))).to(self.plan.device)
        return replace(self.ensemble.surrogates(members), pool=pool)

    def _hooked(self) -> bool:
        bare = Surrogates([lambda x: x] * len(self.plan.nets), pool=torch.zeros(1, 1, 1, 1))
        for technique in self.plan.parts[1:]:
            bare = technique.prepare(bare)
        return bool(bare.forward_hooks)

    def craft(
        self,
        stage: int,
        attack: Any,
        members: Sequence[int] | None,
        goals: Goals,
        parts: Sequence[np.ndarray],
    ) -> Iterator[Chunk]:
        """Yield chunks of these positions of a stage; an out-of-memory error makes them smaller."""
        surrogates = self.surrogates(members)
        kernels = deterministic_operations(self.plan.deterministic, self.plan.device)
        with kernels, self.ensemble.in_eval_mode(), own_randomness(self.plan.seed, "craft", stage):
            waiting = self._cut(parts)
            while waiting:
                for positions, x in read_ahead(self.samples, waiting):
                    with recording(self.store, f"craft-{stage}-{positions[0]}") as record:
                        try:
                            work = partial(self._chunk, stage, attack, surrogates, goals, positions, x)
                            chunk = try_in_memory(work, self.plan.device)
                        except RuntimeError as error:
                            raise RunError(f"crafting failed with {described(error)}.") from error
                    if chunk is None:
                        if len(positions) == 1:
                            raise RunError(NO_MEMORY)
                        record.restart()
                        self.batch = len(positions) // 2
                        self.progress.say(f"out of memory: going on with {self.batch} images at a time")
                        waiting = self._cut(waiting)
                        break
                    waiting = waiting[1:]
                    yield replace(chunk, seconds=record.seconds)
                    record.restart()

    def _cut(self, parts: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Return the parts cut into batches."""
        return [part[begin : begin + self.batch] for part in parts for begin in range(0, len(part), self.batch)]

    def _chunk(
        self, stage: int, attack: Any, surrogates: Surrogates, goals: Goals, positions: np.ndarray, x: Images
    ) -> Chunk:
        device = self.plan.device
        begun, before = time.perf_counter(), self.ensemble.counts
        x = x.to(device)
        labels = torch.from_numpy(self.samples.labels[positions].astype(np.int64)).to(device)
        targets = (
            None if goals is None else torch.tensor([goals[position] for position in positions], device=device)
        )
        goal = Goal(labels, targets)
        rng = RowRng(self.plan.seed, "craft", torch.from_numpy(positions).to(device))
        returned = attack(surrogates, x, goal, self.threat, rng=rng)
        x_adv, finite = self._inside(returned.detach().to(x), x)
        forwards, backwards = (now - then for now, then in zip(self.ensemble.counts, before, strict=True))
        with torch.no_grad():
            logits = surrogates(x_adv)
        hit = goal.reached(logits).tolist()
        predictions, clean = logits.argmax(1).tolist(), x.float().cpu().numpy()
        rows = [
            Verdict(
                int(position),
                int(self.samples.labels[position]),
                predictions[row] if finite[row] else -1,
                0.0,
                bool(hit[row]),
                hashlib.sha256(clean[row].tobytes()).hexdigest(),
                image.tobytes(),
            )
            for row, (position, image) in enumerate(zip(positions, x_adv.float().cpu().numpy(), strict=True))
        ]
        return Chunk(stage, int(positions[0]), forwards, backwards, time.perf_counter() - begun, rows)

    def _inside(self, returned: Images, x: Images) -> tuple[Images, list[bool]]:
        """Return images projected onto ball and box, and which were finite; the clean image for others."""
        finite = returned.flatten(1).isfinite().all(1)
        whole = torch.where(finite.view(-1, *[1] * (x.dim() - 1)), returned, x)
        point = self.threat.project(whole, x)
        if not bool(self.threat.contains(point, x).all()):
            raise RunError(f"an image could not be brought inside {self.threat}; this is a fault of robustkit.")
        return point, finite.tolist()
