"""Samples that enter a continuous batch, and those that leave it with a verdict."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from robustkit.core.shapes import Images, Labels, PerRow
from robustkit.engine.evaluation.verdicts import Verdicts


class Admitted(NamedTuple):
    """Samples that enter a continuous batch.

    Attributes:
        position: of each sample in the data (B).
        ids: of each sample's random numbers (B).
        x: the clean images (B C H W).
        labels: of the images (B).
        clean: the margin of the clean image (B), negative if the model is correct.
        nearest: the highest margin that earlier attacks of the run reached (B), likewise.
        later: whether more may come although these are fewer than the free slots.
    """

    position: np.ndarray
    ids: Labels
    x: Images
    labels: Labels
    clean: PerRow
    nearest: PerRow
    later: bool = False


@dataclass(frozen=True)
class Finished:
    """Samples with a verdict; `stage` (B) is the attack that fooled the model on each, or the last one."""

    position: np.ndarray
    labels: np.ndarray
    stage: np.ndarray
    spent: np.ndarray
    judged: Verdicts

    def select(self, mask: np.ndarray) -> Finished:
        """Return these samples."""
        judged = self.judged.select(mask)
        return Finished(self.position[mask], self.labels[mask], self.stage[mask], self.spent[mask], judged)
