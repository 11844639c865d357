"""Events of a training run. The base class ignores them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from robustkit.engine.progress import Progress


class TrainProgress(Progress):
    """Receives the events of a run; override those to show. It must be picklable for runs on several devices."""

    def begin(self, epochs: int, steps: int, images: int) -> None:
        """Start: the number of epochs, of steps in an epoch, and of images in a step."""

    def step(self, done: int) -> None:
        """A step is done: the number of steps done so far. Called after each step, so it has to be fast."""

    def epoch(self, facts: Mapping[str, Any]) -> None:
        """An epoch is done: its metrics, as in `Trained.history`."""
