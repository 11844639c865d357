"""Progress on stderr: one live line on a terminal, a plain line every 30 seconds elsewhere."""

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

SILENCE = 30.0


class Display(Progress):
    """Shows, per attack: images settled, robust accuracy so far, time left."""

    def __init__(self) -> None:
        self.console = Terminal(stderr=True)
        self.bar: Bar | None = None
        self.spoke = time.monotonic()

    def say(self, text: str) -> None:  # noqa: D102
        self.console.print(text, highlight=False, soft_wrap=True)

    def stage(self, name: str, images: int, robust: int, n: int) -> None:  # noqa: D102
        self.name, self.images, self.n, self.begun = name, images, n, time.monotonic()
        if self.bar is None:
            self.bar, self.task = self.line()
        if self.bar is None:
            return
        self.bar.reset(self.task, total=max(images, 1), description=f"{self.title(name):<20}")
        self.advance(0.0, robust)

    def title(self, name: str) -> str:
        """Return what a stage is called beside its bar."""
        return name

    def line(self) -> tuple[Bar | None, TaskID]:
        """Return a bar on the terminal and a new line of it; None elsewhere."""
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
        elif not self.console.is_terminal and time.monotonic() - self.spoke >= SILENCE:
            self.spoke = time.monotonic()
            left = duration((self.spoke - self.begun) * (self.images / done - 1)) if done else "unknown time"
            parts = [f"{done:.0f} of {self.images} images", self.so_far(robust), f"{left} left"]
            self.say(f"{self.name}: {', '.join(filter(None, parts))}")

    def state(self, robust: int) -> str:
        """Return what the live line says beside its bar."""
        return f"{self.n - robust} images settled   robust acc {percent(robust / self.n)}"

    def so_far(self, robust: int) -> str:
        """Return what a plain line says."""
        return f"robust accuracy so far {percent(robust / self.n)}"

    def close(self) -> None:  # noqa: D102
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


class Board(Display):
    """Shows several runs that are at work: a live line for each, or all in one plain line every 30 seconds."""

    def __init__(self) -> None:
        super().__init__()
        self.under_way: dict[str, str] = {}

    def of(self, name: str) -> Progress:
        """Return what shows the run of that name."""
        return Lane(self, name)

    def note(self, name: str, text: str) -> None:
        """Keep how far a run is, to be said when it is time."""
        self.under_way[name] = text
        if time.monotonic() - self.spoke >= SILENCE:
            self.spoke = time.monotonic()
            self.say("; ".join(self.under_way.values()))


class Lane(Display):
    """One run's line of a `Board`."""

    def __init__(self, board: Board, run: str) -> None:
        super().__init__()
        self.board, self.run = board, run

    def say(self, text: str) -> None:  # noqa: D102
        self.board.say(f"{self.run}: {text}")

    def title(self, name: str) -> str:  # noqa: D102
        return f"{self.run}  {name}"

    def line(self) -> tuple[Bar | None, TaskID]:  # noqa: D102
        return self.board.line()

    def advance(self, done: float, robust: int) -> None:  # noqa: D102
        if self.bar is not None:
            super().advance(done, robust)
        elif done:
            self.board.note(self.run, f"{self.title(self.name)}: {done:.0f} of {self.images} images")

    def close(self) -> None:  # noqa: D102
        self.board.under_way.pop(self.run, None)
        if self.bar is not None:
            self.bar.remove_task(self.task)
            self.bar = None


class CraftDisplay(Display):
    """Shows, per stage: images done, how many fool the surrogates so far, time left."""

    def state(self, robust: int) -> str:  # noqa: D102
        return self.so_far(robust)

    def so_far(self, robust: int) -> str:  # noqa: D102
        return f"{self.n - robust} fool the surrogates" if robust < self.n else ""


class CraftBoard(Board):
    """Shows of each row of a matrix that is at work what `CraftDisplay` shows of one craft run."""

    def of(self, name: str) -> Progress:  # noqa: D102
        return CraftLane(self, name)


class CraftLane(Lane, CraftDisplay):
    """One row's line of a `CraftBoard`."""


class TrainDisplay(TrainProgress):
    """Shows the epoch, the last epoch's loss and accuracy, images a second, time left."""

    def __init__(self) -> None:
        self.bar: Bar | None = None
        self.last = ""

    def say(self, text: str) -> None:  # noqa: D102
        Terminal(stderr=True).print(text, highlight=False, soft_wrap=True)

    def begin(self, epochs: int, steps: int, images: int) -> None:  # noqa: D102
        self.epochs, self.steps, self.images = epochs, steps, images
        self.first, self.begun, self.spoke = -1, time.monotonic(), time.monotonic()
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
            self.first, self.begun = done, now
        if self.bar is None and now - self.spoke < SILENCE:
            return
        rate = (done - self.first) / max(now - self.begun, 1e-9)
        epoch = f"epoch {(done - 1) // self.steps + 1} of {self.epochs}"
        state = f"{self.last}{rate * self.images:,.0f} images/s"
        if self.bar is not None:
            self.bar.update(self.task, completed=done, description=epoch, state=state)
        else:
            self.spoke = now
            left = duration((self.epochs * self.steps - done) / rate) if rate else "unknown time"
            self.say(f"{epoch}: {state}, {left} left")

    def epoch(self, facts: Mapping[str, Any]) -> None:  # noqa: D102
        accuracy = facts.get("test_accuracy")
        self.last = f"loss {facts['loss']:.3f}, " + (f"test {percent(accuracy)}, " if accuracy is not None else "")

    def close(self) -> None:  # noqa: D102
        if self.bar is not None:
            self.bar.stop()
            self.bar = None
