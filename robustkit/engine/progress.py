"""Events of a run, for a display. The base class shows nothing."""

from __future__ import annotations


class Progress:
    """Receives the events of a run; override the methods of those to show."""

    def say(self, text: str) -> None:
        """Show a message of one line, e.g. that the run resumes."""

    def stage(self, name: str, images: int, robust: int, n: int) -> None:
        """Start a stage over `images` of the run's `n` images, of which `robust` are robust so far."""

    def advance(self, done: float, robust: int) -> None:
        """Update how many of the stage's images are done; an unfinished chunk counts in part."""

    def close(self) -> None:
        """Close the display."""
