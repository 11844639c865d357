"""Where a craft run's images are made: on its surrogates, batch by batch, into its ledger."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from robustkit.data.ahead import read_ahead
from robustkit.engine.crafting import Crafting
from robustkit.engine.ensemble import Ensemble, Storage
from robustkit.engine.progress import Progress
from robustkit.engine.worker import NO_MEMORY
from robustkit.errors import RunError
from robustkit.goal import Goal
from robustkit.isolation import own_randomness
from robustkit.ledger import Chunk, Ledger, Verdict
from robustkit.rng import RowRng
from robustkit.shapes import Images
from robustkit.surrogates import Surrogates

BATCH_CPU, BATCH_GPU = 64, 256
# How many of the run's images the others may be mixed with.
POOL = 256
# Stages of the ledger: the goals, the images, and from the third on those without one surrogate each.
GOALS, IMAGES, WITHOUT = 0, 1, 2


class Workshop:
    """Surrogates, images and a ledger; the batch shrinks when memory runs out."""

    def __init__(self, plan: Crafting, ledger: Ledger, progress: Progress) -> None:
        """Set up; the surrogates are loaded when first asked for."""
        self.plan, self.ledger, self.progress = plan, ledger, progress
        self.samples, self.threat = plan.samples, plan.threat
        self.n = len(plan.samples)
        self.batch = min(plan.batch_size or (BATCH_CPU if plan.device.type == "cpu" else BATCH_GPU), self.n)
        self._ensemble: Ensemble | None = None

    @property
    def ensemble(self) -> Ensemble:
        """The surrogates, loaded and tuned when first asked for."""
        if self._ensemble is None:
            plan = self.plan
            storage = Storage.of(plan.nets, self.batch, plan.device, plan.streaming)
            self._ensemble = Ensemble(plan.nets, plan.device, storage, plan.combine, plan.weights)
            x = self.samples.images(np.arange(self.batch)).to(plan.device)
            # In eval mode: trials of a net in training would move its running statistics.
            with self._ensemble.at_rest():
                self._ensemble.tune(x, lambda ways: self.ledger.note("ways", ways), hooked=self._hooked())
        return self._ensemble

    def surrogates(self, members: Sequence[int] | None = None) -> Surrogates:
        """Return the surrogates, or some, with the run's first images for techniques that mix others in."""
        pool = self.samples.images(np.arange(min(POOL, self.n))).to(self.plan.device)
        return replace(self.ensemble.surrogates(members), pool=pool)

    def _hooked(self) -> bool:
        bare = Surrogates([lambda x: x] * len(self.plan.nets), pool=torch.zeros(1, 1, 1, 1))
        for technique in self.plan.parts[1:]:
            bare = technique.prepare(bare)
        return bool(bare.around)

    def goals(self) -> list[int] | None:
        """Return the class wanted of each image, from the ledger or chosen now."""
        plan = self.plan
        if plan.targeted is None:
            return None
        if len(said := self.ledger.said(GOALS)) == self.n:
            return [wanted for _, wanted in said]
        classes = plan.nets[0].classes
        labels = torch.from_numpy(self.samples.labels.astype(np.int64))
        if plan.targeted == "next":
            wanted = (labels + 1) % classes
        elif plan.targeted == "random":
            draws = RowRng(plan.seed, "goals", torch.arange(self.n)).integers(classes - 1, 1)[:, 0]
            wanted = (labels + 1 + draws) % classes
        else:
            wanted = self._least_likely(labels)
        rows = [
            Verdict(place, int(label), int(goal), 0.0, False, "")
            for place, (label, goal) in enumerate(zip(labels.tolist(), wanted.tolist(), strict=True))
        ]
        self.ledger.write(Chunk(GOALS, 0, 0, 0, 0.0, rows))
        return [int(goal) for goal in wanted]

    def _least_likely(self, labels: torch.Tensor) -> torch.Tensor:
        found = []
        with self.ensemble.at_rest(), torch.no_grad(), own_randomness(self.plan.seed, "goals"):
            for begin in range(0, self.n, self.batch):
                at = np.arange(begin, min(begin + self.batch, self.n))
                logits = self.ensemble.surrogates()(self.samples.images(at).to(self.plan.device)).cpu()
                logits[torch.arange(len(at)), labels[at]] = torch.inf
                found.append(logits.argmin(1))
        return torch.cat(found)

    def fill(
        self, stage: int, attack: Any, members: Sequence[int] | None, goals: Sequence[int] | None, name: str
    ) -> None:
        """Craft those images of a stage that the ledger has not yet, batch by batch."""
        done = {position for position, _ in self.ledger.said(stage)}
        waiting = np.array([place for place in range(self.n) if place not in done], np.int64)
        if not len(waiting):
            return
        surrogates = self.surrogates(members)
        fooled = sum(hit for _, hit, _ in self.ledger.crafted(stage))
        self.progress.stage(name, self.n, self.n - fooled, self.n)
        self.progress.advance(len(done), self.n - fooled)
        with self.ensemble.at_rest(), own_randomness(self.plan.seed, "craft", stage):
            blocks = self._blocks(waiting)
            while len(waiting):
                at, x = next(blocks)
                try:
                    chunk = self._chunk(stage, attack, surrogates, goals, at, x)
                except (torch.OutOfMemoryError, MemoryError) as error:
                    if len(at) == 1:
                        raise RunError(NO_MEMORY) from error
                    self.batch = len(at) // 2
                    self.progress.say(f"out of memory: going on with {self.batch} images at a time")
                    blocks = self._blocks(waiting)
                    continue
                self.ledger.write(chunk)
                waiting = waiting[len(at) :]
                fooled += sum(verdict.fooled for verdict in chunk.verdicts)
                self.progress.advance(self.n - len(waiting), self.n - fooled)

    def _blocks(self, waiting: np.ndarray) -> Iterator[tuple[np.ndarray, Images]]:
        return read_ahead(self.samples, np.split(waiting, range(self.batch, len(waiting), self.batch)))

    def _chunk(
        self,
        stage: int,
        attack: Any,
        surrogates: Surrogates,
        goals: Sequence[int] | None,
        at: np.ndarray,
        x: Images,
    ) -> Chunk:
        device = self.plan.device
        begun, before = time.perf_counter(), self.ensemble.counts
        x = x.to(device)
        labels = torch.from_numpy(self.samples.labels[at].astype(np.int64)).to(device)
        wanted = None if goals is None else torch.tensor([goals[place] for place in at], device=device)
        goal = Goal(labels, wanted)
        rng = RowRng(self.plan.seed, "craft", torch.from_numpy(at).to(device))
        found = attack(surrogates, x, goal, self.threat, rng=rng)
        x_adv, finite = self._inside(found.detach().to(x), x)
        forwards, backwards = (now - then for now, then in zip(self.ensemble.counts, before, strict=True))
        with torch.no_grad():
            logits = surrogates(x_adv)
        hit = goal.reached(logits).tolist()
        said, clean = logits.argmax(1).tolist(), x.float().cpu().numpy()
        rows = [
            Verdict(
                int(place),
                int(self.samples.labels[place]),
                said[row] if finite[row] else -1,
                0.0,
                bool(hit[row]),
                hashlib.sha256(clean[row].tobytes()).hexdigest(),
                image.tobytes(),
            )
            for row, (place, image) in enumerate(zip(at, x_adv.float().cpu().numpy(), strict=True))
        ]
        return Chunk(stage, int(at[0]), forwards, backwards, time.perf_counter() - begun, rows)

    def _inside(self, found: Images, x: Images) -> tuple[Images, list[bool]]:
        """Return the images inside ball and box, whatever an attack returned; the clean one for NaN."""
        finite = found.flatten(1).isfinite().all(1)
        whole = torch.where(finite.view(-1, *[1] * (x.dim() - 1)), found, x)
        point = self.threat.project(whole, x)
        if not bool(self.threat.contains(point, x).all()):
            raise RunError(f"an image could not be brought inside {self.threat}; this is a fault of robustkit.")
        return point, finite.tolist()

    def spend(self, attack: Any, goals: Sequence[int] | None) -> int:
        """Return the gradients that the first image costs."""
        with self.ensemble.at_rest(), own_randomness(self.plan.seed, "prices"):
            first = np.array([0])
            return self._chunk(0, attack, self.surrogates(), goals, first, self.samples.images(first)).backwards

    def images(self, stage: int) -> Crafted:
        """Return the images of a stage, which are left where they lie."""
        return Crafted(self.ledger, stage, tuple(self.samples.images([0]).shape[1:]))


@dataclass(frozen=True)
class Crafted:
    """The images of a stage of the ledger, read by their positions as from an array (N C H W) of float32."""

    ledger: Ledger
    stage: int
    shape: tuple[int, ...]

    def __getitem__(self, at: np.ndarray) -> np.ndarray:
        blob = bytearray().join(self.ledger.image(self.stage, position) for position in at.tolist())
        return np.frombuffer(blob, np.float32).reshape(len(at), *self.shape)
