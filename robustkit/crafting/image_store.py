"""A craft run's images in its ledger: crafts those that are missing."""

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

# Stages of the ledger: target classes, images, and from WITHOUT on images crafted without one surrogate each.
GOALS, IMAGES, WITHOUT = 0, 1, 2


class ResumableCrafter(Crafter):
    """A crafter that writes chunks to a ledger and resumes from it."""

    def __init__(self, plan: CraftRequest, ledger: Ledger, progress: Progress, store: Store) -> None:
        """Prepare, as a `Crafter` does."""
        super().__init__(plan, progress, store)
        self.ledger = ledger

    def note(self, configs: str) -> str:
        """Return the execution configs chosen when the run started; these if it starts now."""
        return self.ledger.note("ways", configs)

    def goals(self) -> list[int] | None:
        """Return the target class of each image, from the ledger or chosen now; None for an untargeted attack."""
        plan = self.plan
        if plan.targeted is None:
            return None
        if len(recorded := self.ledger.predictions(GOALS)) == self.n:
            return [target for _, target in recorded]
        classes = plan.nets[0].classes
        labels = torch.from_numpy(self.samples.labels.astype(np.int64))
        if plan.targeted == "next":
            targets = (labels + 1) % classes
        elif plan.targeted == "random":
            draws = RowRng(plan.seed, "goals", torch.arange(self.n)).integers(classes - 1, 1)[:, 0]
            targets = (labels + 1 + draws) % classes
        else:
            targets = self._least_likely(labels)
        rows = [
            Verdict(place, int(label), int(goal), 0.0, False, "")
            for place, (label, goal) in enumerate(zip(labels.tolist(), targets.tolist(), strict=True))
        ]
        self.ledger.write(Chunk(GOALS, 0, 0, 0, 0.0, rows))
        return [int(goal) for goal in targets]

    def _least_likely(self, labels: torch.Tensor) -> torch.Tensor:
        targets = []
        with self.ensemble.in_eval_mode(), torch.no_grad(), own_randomness(self.plan.seed, "goals"):
            for begin in range(0, self.n, self.batch):
                positions = np.arange(begin, min(begin + self.batch, self.n))
                logits = self.ensemble.surrogates()(self.samples.images(positions).to(self.plan.device)).cpu()
                logits[torch.arange(len(positions)), labels[positions]] = torch.inf
                targets.append(logits.argmin(1))
        return torch.cat(targets)

    def craft_missing(
        self, stage: int, attack: Any, members: Sequence[int] | None, goals: Sequence[int] | None, name: str
    ) -> None:
        """Craft the images of a stage that the ledger does not have, batch by batch."""
        done = {position for position, _ in self.ledger.predictions(stage)}
        if len(done) == self.n:
            return
        parts = []
        # Cut from all images, so that batches are the same after a resume.
        for begin in range(0, self.n, self.batch):
            left = [place for place in range(begin, min(begin + self.batch, self.n)) if place not in done]
            parts += [np.array(left, np.int64)] if left else []
        self.ensemble  # noqa: B018  (loaded and tuned before the stage begins)
        fooled, ready = sum(hit for _, hit, _ in self.ledger.crafted(stage)), len(done)
        self.progress.stage(name, self.n, self.n - fooled, self.n)
        self.progress.advance(ready, self.n - fooled)
        for chunk in self.craft(stage, attack, members, goals, parts):
            self.ledger.write(chunk)
            ready += len(chunk.verdicts)
            fooled += sum(verdict.fooled for verdict in chunk.verdicts)
            self.progress.advance(ready, self.n - fooled)

    def close(self) -> None:
        """Release the workers, of which this class has none."""

    def gradients_per_image_of(self, attack: Any, goals: Sequence[int] | None) -> int:
        """Return the gradients that the attack takes for the first image."""
        with self.ensemble.in_eval_mode(), own_randomness(self.plan.seed, "prices"):
            first = np.array([0])
            return self._chunk(0, attack, self.surrogates(), goals, first, self.samples.images(first)).backwards

    def images(self, stage: int) -> LedgerImages:
        """Return the images of a stage, read from the ledger on access."""
        return LedgerImages(self.ledger, stage, tuple(self.samples.images([0]).shape[1:]))


@dataclass(frozen=True)
class LedgerImages:
    """The images of a stage of the ledger, indexed by positions like an array (N C H W) of float32."""

    ledger: Ledger
    stage: int
    shape: tuple[int, ...]

    def __getitem__(self, positions: np.ndarray) -> np.ndarray:
        blob = bytearray().join(self.ledger.image(self.stage, position) for position in positions.tolist())
        return np.frombuffer(blob, np.float32).reshape(len(positions), *self.shape)
