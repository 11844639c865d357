"""A run on several devices as a simulation by discrete events: how long it takes, and what the time goes to.

The devices do as the engine's workers do. Each has up to `slots` images in its batch and takes one step of all of
them with every pass: a pass takes a fixed time and a time for each image in the batch, so the last images pay for
passes that are nearly empty. It has two tasks of a fraction of a second at once. After each, the driver, which
does one thing after the other, writes the verdicts and sends the images for the task after the next one, at most
the device's share of the queue. When the queue is empty, the device with most images gives every other one to one
that has none. One device is a run in one process, whose driver is the device itself.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from robustkit.engine.evaluation.search_scheduler import (
    SPLIT_EVERY,
    STEP_SECONDS,
    WORTH_SPLITTING,
    samples_to_send,
)

# What the time of all devices goes to: images, what passes take whatever is in them, start-up, clean pass and
# checks, waiting for the driver, and at the end for the slowest images.
PARTS = ("work", "passes", "start", "clean", "driver", "tail")
# Tasks of a device that are simulated one by one; in a long run a simulated task stands for several.
MAX_TASKS = 200


@dataclass(frozen=True)
class Job:
    """An image: seconds of work by itself, spread evenly over passes that follow one another."""

    work: float
    passes: int


@dataclass(frozen=True)
class Site:
    """Where a run is done, all in seconds.

    `overhead` is what a pass takes whatever is in the batch; `startup` what a worker takes before its first image;
    `opening` what is done before the attacks by one device alone; `clean` the work of a clean pass that workers
    share. Of the driver's time each image takes `handout` and `verdict`, and each message `message`; meanwhile it
    writes the image to the ledger in another thread, which takes `writing`.
    """

    devices: int
    slots: int
    overhead: float = 0.0
    startup: float = 0.0
    opening: float = 0.0
    clean: float = 0.0
    handout: float = 0.0
    verdict: float = 0.0
    message: float = 0.0
    writing: float = 0.0

    @property
    def begin(self) -> float:
        """When attacks begin. The checks run while other workers share the clean pass."""
        if self.devices == 1:
            return self.startup + self.opening + self.clean
        return self.startup + max(self.opening, (self.opening + self.clean) / self.devices)

    @property
    def slower(self) -> float:
        """By which factor messages, the same in every second, slow down the driver's other work."""
        share = self.devices * self.message / STEP_SECONDS
        return 1.0 if self.devices == 1 else 1 / (1 - min(share, 0.99))


@dataclass(frozen=True)
class Course:
    """How a run went: seconds until its end, and what the devices' time went to, by `PARTS`."""

    seconds: float
    shares: dict[str, float]

    @property
    def bound(self) -> str:
        """Return what most of the time goes to that is not the attacks."""
        return max((name for name in self.shares if name != "work"), key=self.shares.__getitem__)


@dataclass
class _Device:
    """A device.

    Attributes:
        active: the images in its batch by the pass at which each ends, with their time in a pass.
        waiting: images that wait for a free row.
        tasks: its next tasks: when each is there, and the images that it brings.
        load: seconds of a pass for the images.
        done: passes so far.
        waited: seconds that it has waited for the driver.
        giving: tasks until it gives images away; None if it is not to.
    """

    active: list[tuple[int, int, float]] = field(default_factory=list)
    waiting: deque[tuple[int, Job]] = field(default_factory=deque)
    tasks: deque[tuple[float, list[tuple[int, Job]]]] = field(default_factory=deque)
    load: float = 0.0
    done: int = 0
    waited: float = 0.0
    giving: int | None = None

    @property
    def held(self) -> int:
        """How many images it has, those on their way included."""
        return len(self.active) + len(self.waiting) + sum(len(images) for _, images in self.tasks)

    def fill(self, slots: int) -> int:
        """Put waiting images into free rows; return how many."""
        count = min(slots - len(self.active), len(self.waiting))
        for _ in range(count):
            number, job = self.waiting.popleft()
            passes = max(job.passes, 1)
            heapq.heappush(self.active, (self.done + passes, number, job.work / passes))
            self.load += job.work / passes
        return count

    def run(self, passes: int) -> int:
        """Run so many passes; return how many images have finished."""
        self.done += passes
        count = 0
        while self.active and self.active[0][0] <= self.done:
            self.load -= heapq.heappop(self.active)[2]
            count += 1
        if not self.active:
            self.load = 0.0
        return count


class _Run:
    """One simulation, event by event: an event is the end of a device's task."""

    def __init__(self, jobs: Sequence[Job], site: Site) -> None:
        self.site, self.queue = site, deque(enumerate(jobs))
        self.left = len(self.queue)
        self.begin = self.free_at = self.written_at = self.last = site.begin
        self.devices = [_Device() for _ in range(site.devices)]
        self.events: list[tuple[float, int, int]] = []
        self.idle = set[int]()
        self.split_at = -math.inf
        self.passes = 0
        ideal = sum(job.work for job in jobs) / site.devices
        self.task = math.inf if site.devices == 1 else max(STEP_SECONDS, ideal / MAX_TASKS)
        self.slower = site.slower

    def go(self) -> None:
        """Do everything."""
        for number in range(len(self.devices)):
            for _ in range(2):
                self._send(number, self.begin, 0)
            self._start(number, self.begin)
        while self.left:
            now, number, finished = heapq.heappop(self.events)
            self._end(now, number, finished)

    def _send(self, number: int, now: float, finished: int) -> None:
        """Have the driver take in a result and send the task after the next one."""
        device, site = self.devices[number], self.site
        if site.devices == 1:
            images, self.queue = list(self.queue), deque()
        else:
            count = samples_to_send(site.slots - device.held, finished, len(self.queue), site.devices)
            images = [self.queue.popleft() for _ in range(count)]
            seconds = finished * site.verdict + len(images) * site.handout
            self.free_at = max(self.free_at, now) + (site.message + seconds) * self.slower
            self.written_at = max(self.written_at, self.free_at) + finished * site.writing
        device.tasks.append((self.free_at, images))

    def _start(self, number: int, now: float) -> None:
        """Have a device run its next task, once that is there."""
        device, site = self.devices[number], self.site
        if not (device.held or self.queue):
            self.idle.add(number)
            return
        self.idle.discard(number)
        there, images = device.tasks.popleft()
        device.waited += max(there - now, 0.0)
        now = max(there, now)
        device.waiting.extend(images)
        end, finished = now + self.task, 0
        while True:
            taken = device.fill(site.slots)
            now += taken * site.handout * (site.devices == 1)
            if not device.active or now >= end:
                break
            seconds = site.overhead + device.load
            passes = device.active[0][0] - device.done
            if end < math.inf and seconds:
                passes = min(passes, math.ceil((end - now) / seconds))
            self.passes += passes
            now += passes * seconds
            ended = device.run(passes)
            now += ended * (site.verdict + site.writing) * (site.devices == 1)
            finished += ended
        heapq.heappush(self.events, (now, number, finished))

    def _end(self, now: float, number: int, finished: int) -> None:
        device = self.devices[number]
        self.left -= finished
        if finished:
            self.last = max(self.last, now)
        if device.giving is not None:
            device.giving -= 1
            if device.giving == 0:
                device.giving = None
                self._give(number, now)
        self._send(number, now, finished)
        self._start(number, now)
        if self.idle:
            self._split(now)

    def _split(self, now: float) -> None:
        """Have the device with most images give some away after the tasks that it has."""
        if self.queue or now < self.split_at + SPLIT_EVERY:
            return
        giver = max(self.devices, key=lambda device: device.held)
        if giver.held >= WORTH_SPLITTING and giver.giving is None:
            self.split_at, giver.giving = now, 2

    def _give(self, number: int, now: float) -> None:
        """Give every other image of the batch to an idle device."""
        giver = self.devices[number]
        if not self.idle:
            return
        taker_number = min(self.idle)
        taker = self.devices[taker_number]
        rows = sorted(giver.active)
        giver.active, given = rows[::2], rows[1::2]
        taker.active = [(end - giver.done + taker.done, index, rate) for end, index, rate in given]
        for device in (giver, taker):
            device.load = sum(rate for *_, rate in device.active)
        taker.tasks = deque([(now + self.site.message, [])] * 2)
        self._start(taker_number, now)


def simulate(jobs: Iterable[Job], site: Site) -> Course:
    """Return how a run of these images goes, handed out in their order."""
    jobs = list(jobs)
    run = _Run(jobs, site)
    run.go()
    seconds = max(run.last, run.free_at, run.written_at)
    whole = site.devices * seconds
    if not whole:
        return Course(0.0, dict.fromkeys(PARTS, 0.0))
    start = min(site.startup, run.begin)
    spent = {
        "work": sum(job.work for job in jobs),
        "passes": site.overhead * run.passes,
        "start": site.devices * start,
        "clean": site.devices * (run.begin - start),
        "driver": sum(device.waited for device in run.devices) + site.devices * (seconds - run.last),
    }
    if site.devices == 1:
        spent["driver"] = len(jobs) * (site.handout + site.verdict + site.writing)
    shares = {name: value / whole for name, value in spent.items()}
    return Course(seconds, {**shares, "tail": max(0.0, 1 - sum(shares.values()))})


def joined(courses: Sequence[Course]) -> Course:
    """Return how a run goes that is these, each begun when the one before is over."""
    seconds = sum(course.seconds for course in courses)
    shares = {name: sum(course.seconds * course.shares[name] for course in courses) for name in PARTS}
    return Course(seconds, {name: value / seconds if seconds else 0.0 for name, value in shares.items()})


def extended(jobs: list[Job], site: Site, n: int) -> Course:
    """Return how a run of n images goes of which `jobs` are the first: those beyond add to a steady state."""
    course = simulate(jobs, site)
    more = n - len(jobs)
    if more <= 0:
        return course
    passes = sum(max(job.passes, 1) for job in jobs) / len(jobs)
    each = sum(job.work for job in jobs) / len(jobs)
    driver = (site.handout + site.verdict) * site.slower
    own = each + site.overhead * passes / site.slots
    pace = own + driver + site.writing
    if site.devices > 1:
        pace = max(own / site.devices, driver, site.writing)
    seconds = course.seconds + more * pace
    grown = {name: share * course.seconds for name, share in course.shares.items()}
    grown["work"] += more * each / site.devices
    grown["passes"] += more * (own - each) / site.devices
    grown["driver"] += more * (pace - own / site.devices)
    return Course(seconds, {name: value / seconds for name, value in grown.items()})
