"""What a cost probe measures: the speed of the model, memory, the time of its steps; and when it stops."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from robustkit.core.devices import ComputeDevice
from robustkit.core.errors import RobustkitError, RunError
from robustkit.core.out_of_memory import NO_MEMORY, try_in_memory
from robustkit.core.shapes import Images
from robustkit.engine.model.instrumented_model import InstrumentedModel
from robustkit.engine.progress import Progress

# The least multiple of the model's own time that an image's passes are taken to need.
MIN_DRAG = 0.5


class ProbeTimeUp(RobustkitError):
    """The probe's time is up in the middle of an attack."""


@dataclass(frozen=True)
class Speed:
    """Seconds per image in a pass of `at_once` images, and the seconds of a pass whatever its size (`fixed`)."""

    forward: float
    both: float
    fixed: float
    at_once: int

    @property
    def marginal(self) -> tuple[float, float]:
        """Seconds of one more image in a pass, forward and backward."""
        each = max(self.both - self.fixed / self.at_once, 0.0)
        share = min(self.forward / self.both, 1.0) if self.both else 0.0
        return each * share, each * (1 - share)


class PassCounter(InstrumentedModel):
    """An instrumented model that counts passes as well: `calls`."""

    calls = 0

    @property
    def counts(self) -> np.ndarray:
        """Forwards, backwards and passes so far."""
        return np.array([self.forwards, self.backwards, self.calls])

    def _in_micro_batches(
        self, x: Images, differentiable: bool, net: Callable[[Images], torch.Tensor], passes: int = 1
    ) -> torch.Tensor:
        self.calls += passes * (
            1 if self.micro_batch is None else math.ceil(len(x) / max(self.micro_batch // passes, 1))
        )
        return super()._in_micro_batches(x, differentiable, net, passes)

    def speed(self, x: Images, most: int, limit: float) -> Speed:
        """Return the model's speed by batches of x that double up to `most` within `limit` seconds, uncounted."""
        timings: list[tuple[int, float, float]] = []
        size, calls = 1, self.calls
        self._time_both(x[:1])
        while True:
            batch = x.repeat(-(-size // len(x)), 1, 1, 1)[:size]
            times = try_in_memory(partial(self._times, batch, 1 if timings else 3), self.device)
            if times is None and not timings:
                raise RunError(NO_MEMORY)
            if times is None:
                break
            forward, both = (min(column) for column in zip(*times, strict=True))
            timings.append((size, forward, both))
            if size == most or 2 * both > limit:
                break
            size = min(2 * size, most)
        self.calls = calls
        (_, _, alone), (size, forward, both) = timings[0], timings[-1]
        fixed = max(0.0, (size * alone - both) / (size - 1)) if size > 1 else 0.0
        return Speed(forward / size, both / size, min(fixed, both), size)

    def _times(self, batch: Images, rounds: int) -> list[tuple[float, float]]:
        """Return the seconds of a forward pass, and of one with a backward pass, in each round."""
        return [(self._time_forward(batch), self._time_both(batch)) for _ in range(rounds)]

    def _time_forward(self, x: Images) -> float:
        begun = time.perf_counter()
        with torch.no_grad():
            self._in_micro_batches(x, False, self.uncounted)
        return self.since(begun)

    def _time_both(self, x: Images) -> float:
        begun = time.perf_counter()
        images = x.detach().requires_grad_()
        logits = self._in_micro_batches(images, True, self.uncounted)
        if logits.requires_grad:
            torch.autograd.grad(logits.sum(), images)
        return self.since(begun)


class Memory:
    """Memory in use now and at most: of the device, or of the process on a CPU."""

    def __init__(self, device: ComputeDevice) -> None:
        """Measure from now on."""
        self.device = device
        device.reset_most_allocated()
        self.resident_before = _most_resident()
        self.at_start = self.seen = self.now()

    def now(self) -> int:
        """Return the bytes in use."""
        if not self.device.is_cpu:
            return self.device.allocated()
        try:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
        except (OSError, IndexError, ValueError):
            return _most_resident()
        return pages * os.sysconf("SC_PAGE_SIZE")

    def observe(self) -> None:
        """Note what is in use now."""
        self.seen = max(self.seen, self.now())

    @property
    def peak(self) -> int:
        """The most bytes in use at once."""
        if not self.device.is_cpu:
            return self.device.most_allocated()
        # The process's own maximum counts only if it rose during the probe.
        after = _most_resident()
        return max(self.seen, after if after > self.resident_before else 0)


def _most_resident() -> int:
    """Return the most bytes that the process has had in memory; 0 if the system does not report it."""
    try:
        import resource
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Stopwatch(Progress):
    """Stops the attacks when their time is up; notes seconds, passes and memory at each step."""

    def __init__(
        self, memory: Memory, clock: Callable[[], float], instrumented: PassCounter, listener: Progress
    ) -> None:
        """Start without a time limit; `listener` receives messages."""
        self.memory, self.clock, self.instrumented, self.end = memory, clock, instrumented, math.inf
        self.listener = listener
        self.steps: list[np.ndarray] = []
        self.restart()

    def say(self, text: str) -> None:  # noqa: D102
        self.listener.say(text)

    def restart(self) -> None:
        """Exclude what has passed since the last step."""
        self.last: np.ndarray = np.array([self.clock(), *self.instrumented.counts])

    def advance(self, done: float, robust: int) -> None:  # noqa: D102
        self.memory.observe()
        now = np.array([self.clock(), *self.instrumented.counts])
        if self.end < math.inf:
            self.steps.append(now - self.last)
        self.last = now
        if now[0] > self.end:
            raise ProbeTimeUp("the probe's time is up.")

    def fit(self, speed: Speed, seconds: float) -> tuple[float, float]:
        """Return the seconds of a pass besides its images, and those of an image as a multiple of the model's own.

        Fitted by least squares over the steps, both non-negative and the multiple at least `MIN_DRAG`; scaled so
        that they add up to `seconds`.
        """
        steps = np.array(self.steps).reshape(-1, 4)
        took, calls = steps[:, 0], steps[:, 3]
        forward, backward = speed.marginal
        work = steps[:, 1] * forward + steps[:, 2] * backward
        across = calls @ work
        det = (calls @ calls) * (work @ work) - across**2
        drag = ((calls @ calls) * (work @ took) - across * (calls @ took)) / det if det > 0 else 1.0
        drag = max(drag, MIN_DRAG)
        overhead = max((took.sum() - drag * work.sum()) / calls.sum(), 0.0) if calls.sum() else 0.0
        whole = overhead * calls.sum() + drag * work.sum()
        scale = seconds / whole if whole else 1.0
        return float(overhead * scale), float(drag * scale)
