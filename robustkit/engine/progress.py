"""What the engine tells whoever watches. The base class is silent."""

from __future__ import annotations


class Progress:
    """Receives the run's events; override what you want to show."""

    def say(self, text: str) -> None:
        """Take one line of news, e.g. that the run resumes."""

    def stage(self, name: str, images: int, robust: int, n: int) -> None:
        """Begin a stage over `images` of the run's `n`, of which `robust` still stand."""

    def advance(self, done: float, robust: int) -> None:
        """Note how many of the stage's images are done so far; a chunk under way counts by its share."""

    def close(self) -> None:
        """End the display."""
