"""Progress on stderr: one live line on a terminal, a plain line every 30 seconds elsewhere."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from robustkit.engine.progress import Progress
from robustkit.report.table import duration, percent

SILENCE = 30.0


class Display(Progress):
    """Shows, per attack: images settled, robust accuracy so far, time left."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, markup=False)
        self.bar: Bar | None = None
        self.spoke = time.monotonic()

    def say(self, text: str) -> None:  # noqa: D102
        self.console.print(text, highlight=False, soft_wrap=True)

    def stage(self, name: str, images: int, robust: int, n: int) -> None:  # noqa: D102
        self.name, self.images, self.n, self.begun = name, images, n, time.monotonic()
        if not self.console.is_terminal:
            return
        if self.bar is None:
            self.bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[settled]} images settled   robust acc {task.fields[robust]}"),
                TimeRemainingColumn(compact=True),
                console=self.console,
                transient=True,
            )
            self.task = self.bar.add_task("", total=1.0, settled=0, robust="")
            self.bar.start()
        self.bar.reset(self.task, total=max(images, 1), description=f"{name:<20}")
        self.advance(0.0, robust)

    def advance(self, done: float, robust: int) -> None:  # noqa: D102
        done, accuracy = min(done, self.images), percent(robust / self.n)
        if self.bar is not None:
            self.bar.update(self.task, completed=done, settled=self.n - robust, robust=accuracy)
        elif not self.console.is_terminal and time.monotonic() - self.spoke >= SILENCE:
            self.spoke = time.monotonic()
            left = duration((self.spoke - self.begun) * (self.images / done - 1)) if done else "unknown time"
            self.say(
                f"{self.name}: {done:.0f} of {self.images} images, robust accuracy so far {accuracy}, {left} left"
            )

    def close(self) -> None:  # noqa: D102
        if self.bar is not None:
            self.bar.stop()
            self.bar = None
