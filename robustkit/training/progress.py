"""What a training run tells whoever watches. The base class is silent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from robustkit.engine.progress import Progress


class TrainProgress(Progress):
    """Receives the run's events; override what you want to show. It must pickle, for runs on several devices."""

    def begin(self, epochs: int, steps: int, images: int) -> None:
        """Take the number of epochs, of steps in each, and of images in a step."""

    def step(self, done: int) -> None:
        """Note how many steps of the run are done; called after each, and to be quick."""

    def epoch(self, facts: Mapping[str, Any]) -> None:
        """Take the facts of a finished epoch, as in `Trained.history`."""
