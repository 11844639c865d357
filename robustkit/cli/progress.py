"""Progress on stderr: a live line on a terminal, a plain line every 30 seconds elsewhere."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from rich.progress import BarColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from robustkit.cli.terminal import Terminal
from robustkit.engine.progress import Progress
from robustkit.reporting.terminal.evaluation import duration, percent
from robustkit.training.progress import TrainProgress

SECONDS_BETWEEN_LINES = 30.0


class Display(Progress):
    """Shows, per attack: images with a verdict, robust accuracy so far, time left."""

    def __init__(self) -> None:
        self.console = Terminal(stderr=True)
        self.bar: Bar | None = None
        self.last_printed = time.monotonic()

    def say(self, text: str) -> None:  # noqa: D102
        self.console.print(text, highlight=False, soft_wrap=True)

    def stage(self, name: str, images: int, robust: int, n: int) -> None:  # noqa: D102
        self.name, self.images, self.n, self.started = name, images, n, time.monotonic()
        if self.bar is None:
            self.bar, self.task = self.line()
        if self.bar is None:
            return
        self.bar.reset(self.task, total=max(images, 1), description=f"{self.title(name):<20}")
        self.advance(0.0, robust)

    def title(self, name: str) -> str:
        """Return the name of a stage beside its bar."""
        return name

    def line(self) -> tuple[Bar | None, TaskID]:
        """Return the bar on the terminal with a new line; None if stderr is no terminal."""
        if not self.console.is_terminal:
            return None, TaskID(0)
        if self.bar is None:
            self.bar = Bar(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[state]}", markup=False),
                TimeRemainingColumn(compact=True),
                console=self.console,
                transient=True,
            )
            self.bar.start()
        return self.bar, self.bar.add_task("", total=1.0, state="")

    def advance(self, done: float, robust: int) -> None:  # noqa: D102
        done = min(done, self.images)
        if self.bar is not None:
            self.bar.update(self.task, completed=done, state=self.state(robust))
        elif not self.console.is_terminal and time.monotonic() - self.last_printed >= SECONDS_BETWEEN_LINES:
            self.last_printed = time.monotonic()
            left = (
                duration((self.last_printed - self.started) * (self.images / done - 1)) if done else "unknown time"
            )
            parts = [f"{done:.0f} of {self.images} images", self.so_far(robust), f"{left} left"]
            self.say(f"{self.name}: {', '.join(filter(None, parts))}")

    def state(self, robust: int) -> str:
        """Return the text of the live line beside its bar."""
        return f"{self.n - robust} images settled   robust acc {percent(robust / self.n)}"

    def so_far(self, robust: int) -> str:
        """Return the text of a plain line."""
        return f"robust accuracy so far {percent(robust / self.n)}"

    def close(self) -> None:  # noqa: D102
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


class RunsDisplay(Display):
    """Shows several runs in progress: a live line for each, or one plain line for all every 30 seconds."""

    def __init__(self) -> None:
        super().__init__()
        self.states: dict[str, str] = {}

    def of_run(self, name: str) -> Progress:
        """Return the display of a run."""
        return RunDisplay(self, name)

    def update(self, name: str, text: str) -> None:
        """Store the progress of a run, to be printed with the next plain line."""
        self.states[name] = text
        if time.monotonic() - self.last_printed >= SECONDS_BETWEEN_LINES:
            self.last_printed = time.monotonic()
            self.say("; ".join(self.states.values()))


class RunDisplay(Display):
    """The line of one run in a `RunsDisplay`."""

    def __init__(self, runs: RunsDisplay, run: str) -> None:
        super().__init__()
        self.runs, self.run = runs, run

    def say(self, text: str) -> None:  # noqa: D102
        self.runs.say(f"{self.run}: {text}")

    def title(self, name: str) -> str:  # noqa: D102
        return f"{self.run}  {name}"

    def line(self) -> tuple[Bar | None, TaskID]:  # noqa: D102
        return self.runs.line()

    def advance(self, done: float, robust: int) -> None:  # noqa: D102
        if self.bar is not None:
            super().advance(done, robust)
        elif done:
            self.runs.update(self.run, f"{self.title(self.name)}: {done:.0f} of {self.images} images")

    def close(self) -> None:  # noqa: D102
        self.runs.states.pop(self.run, None)
        if self.bar is not None:
            self.bar.remove_task(self.task)
            self.bar = None


class CraftDisplay(Display):
    """Shows, per stage: images done, how many fool the surrogates so far, time left."""

    def state(self, robust: int) -> str:  # noqa: D102
        return self.so_far(robust)

    def so_far(self, robust: int) -> str:  # noqa: D102
        return f"{self.n - robust} fool the surrogates" if robust < self.n else ""


class AccuracyDisplay(Display):
    """Shows, per stage: images done, how many of them are misclassified, time left."""

    def state(self, robust: int) -> str:  # noqa: D102
        return self.so_far(robust)

    def so_far(self, robust: int) -> str:  # noqa: D102
        return f"{self.n - robust} misclassified"


class MatrixDisplay(RunsDisplay):
    """Shows for each row of a matrix in progress what `CraftDisplay` shows for a craft run."""

    def of_run(self, name: str) -> Progress:  # noqa: D102
        return MatrixRowDisplay(self, name)


class MatrixRowDisplay(RunDisplay, CraftDisplay):
    """The line of one row in a `MatrixDisplay`."""


class TrainDisplay(TrainProgress):
    """Shows the epoch, the last epoch's loss and accuracy, images a second, time left."""

    def __init__(self) -> None:
        self.bar: Bar | None = None
        self.last = ""

    def say(self, text: str) -> None:  # noqa: D102
        Terminal(stderr=True).print(text, highlight=False, soft_wrap=True)

    def begin(self, epochs: int, steps: int, images: int) -> None:  # noqa: D102
        self.epochs, self.steps, self.images = epochs, steps, images
        self.first, self.started, self.last_printed = -1, time.monotonic(), time.monotonic()
        console = Terminal(stderr=True)
        if console.is_terminal:
            self.bar = Bar(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[state]}", markup=False),
                TimeRemainingColumn(compact=True),
                console=console,
                transient=True,
            )
            self.task = self.bar.add_task("", total=epochs * steps, state="")
            self.bar.start()

    def step(self, done: int) -> None:  # noqa: D102
        now = time.monotonic()
        if self.first < 0:
            self.first, self.started = done, now
        if self.bar is None and now - self.last_printed < SECONDS_BETWEEN_LINES:
            return
        rate = (done - self.first) / max(now - self.started, 1e-9)
        epoch = f"epoch {(done - 1) // self.steps + 1} of {self.epochs}"
        state = f"{self.last}{rate * self.images:,.0f} images/s"
        if self.bar is not None:
            self.bar.update(self.task, completed=done, description=epoch, state=state)
        else:
            self.last_printed = now
            left = duration((self.epochs * self.steps - done) / rate) if rate else "unknown time"
            self.say(f"{epoch}: {state}, {left} left")

    def epoch(self, facts: Mapping[str, Any]) -> None:  # noqa: D102
        accuracy = facts.get("test_accuracy")
        self.last = f"loss {facts['loss']:.3f}, " + (f"test {percent(accuracy)}, " if accuracy is not None else "")

    def close(self) -> None:  # noqa: D102
        if self.bar is not None:
            self.bar.stop()
            self.bar = None
