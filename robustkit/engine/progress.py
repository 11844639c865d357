"""Events of a run, for a display. The base class shows nothing."""

from __future__ import annotations

from collections.abc import Callable


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


class CheckedProgress(Progress):
    """Passes the events of a run on to another, and calls `check`, which may end the run, at each of them."""

    def __init__(self, inner: Progress, check: Callable[[], None]) -> None:
        """Pass on to `inner`."""
        self.inner, self.check = inner, check

    def say(self, text: str) -> None:  # noqa: D102
        self.inner.say(text)

    def stage(self, name: str, images: int, robust: int, n: int) -> None:  # noqa: D102
        self.check()
        self.inner.stage(name, images, robust, n)

    def advance(self, done: float, robust: int) -> None:  # noqa: D102
        self.check()
        self.inner.advance(done, robust)

    def close(self) -> None:  # noqa: D102
        self.inner.close()
