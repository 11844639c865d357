"""A craft run's images: those that its ledger has not yet are made, and written there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from robustkit.core.isolation import own_randomness
from robustkit.core.rng import RowRng
from robustkit.crafting.batches import Crafter
from robustkit.crafting.spec import CraftRequest
from robustkit.engine.progress import Progress
from robustkit.runs.ledger import Chunk, Ledger, Verdict
from robustkit.runs.unfinished_work import Store

# Stages of the ledger: the goals, the images, and from the third on those without one surrogate each.
GOALS, IMAGES, WITHOUT = 0, 1, 2


class ResumableCrafter(Crafter):
    """A bench with a ledger that what is made goes into."""

    def __init__(self, plan: CraftRequest, ledger: Ledger, progress: Progress, store: Store) -> None:
        """Set up."""
        super().__init__(plan, progress, store)
        self.ledger = ledger

    def note(self, ways: str) -> str:
        """Return the way that was chosen when the run began, which is this one if it begins now."""
        return self.ledger.note("ways", ways)

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
        if len(done) == self.n:
            return
        parts = []
        # Cut from all images, whatever is done already: the same batches after any resume.
        for begin in range(0, self.n, self.batch):
            left = [place for place in range(begin, min(begin + self.batch, self.n)) if place not in done]
            parts += [np.array(left, np.int64)] if left else []
        self.ensemble  # noqa: B018  (loaded and tuned before the stage begins)
        fooled, ready = sum(hit for _, hit, _ in self.ledger.crafted(stage)), len(done)
        self.progress.stage(name, self.n, self.n - fooled, self.n)
        self.progress.advance(ready, self.n - fooled)
        for chunk in self.make(stage, attack, members, goals, parts):
            self.ledger.write(chunk)
            ready += len(chunk.verdicts)
            fooled += sum(verdict.fooled for verdict in chunk.verdicts)
            self.progress.advance(ready, self.n - fooled)

    def close(self) -> None:
        """End what was begun for the images; here there is nothing."""

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
