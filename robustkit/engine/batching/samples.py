"""Samples that come aboard a flight, and those that leave it with their verdict."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from robustkit.core.shapes import Images, Labels, PerRow
from robustkit.engine.evaluation.verdicts import Verdicts


class Admitted(NamedTuple):
    """Samples that come aboard: positions in the data, ids for their dice, images, labels.

    `clean` is how far the clean image is beyond the boundary, `nearest` how far earlier flights of the run came;
    both are negative where the model is right. `later` is whether others may come although there were fewer than
    asked for.
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
    """Samples whose verdict is there; `stage` (B) is the attack that each fell to, or the last."""

    position: np.ndarray
    labels: np.ndarray
    stage: np.ndarray
    spent: np.ndarray
    judged: Verdicts

    def select(self, mask: np.ndarray) -> Finished:
        """Return these samples."""
        judged = self.judged.select(mask)
        return Finished(self.position[mask], self.labels[mask], self.stage[mask], self.spent[mask], judged)
