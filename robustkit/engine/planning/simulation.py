"""A run on several devices as a simulation by discrete events: how long it takes, and what the time goes to.

The devices do as the engine's workers do. Each keeps up to `slots` images on board and takes one step of all of
them with every pass: a pass takes a fixed time and a time for each image on board, so the last images pay for
passes that are nearly empty. It asks the driver, which answers one question after the other, for more as slots get
free, and gets at most its share of the queue; when that is empty, whoever has most on board gives away every other
image. One device is a run in one process, whose driver is the device itself.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from robustkit.engine.evaluation.scheduler import SHARES, SPLIT_EVERY, WORTH_SPLITTING

# What the time of all devices goes to: images, what passes take whatever is in them, start-up, clean pass and
# checks, waiting for the driver, and at the end for the slowest images.
PARTS = ("work", "passes", "start", "clean", "driver", "tail")


@dataclass(frozen=True)
class Job:
    """An image: seconds of work by itself, spread evenly over passes that follow one another."""

    work: float
    passes: int


@dataclass(frozen=True)
class Site:
    """Where a run is done, all in seconds.

    `overhead` is what a pass takes whatever is on board; `startup` what a worker takes before its first image;
    `opening` what the driver does alone before the attacks; `clean` the work of a clean pass that workers share,
    of which the driver has `reading`. Of its time then each image takes `handout` and `verdict`, and each message
    `message`.
    """

    devices: int
    slots: int
    overhead: float = 0.0
    startup: float = 0.0
    opening: float = 0.0
    clean: float = 0.0
    reading: float = 0.0
    handout: float = 0.0
    verdict: float = 0.0
    message: float = 0.0

    @property
    def begin(self) -> float:
        """When attacks begin. Where no clean pass is shared, the driver does its part while workers start."""
        if self.devices == 1:
            return self.startup + self.opening + self.clean + self.reading
        if not self.clean:
            return max(self.startup, self.opening)
        return self.startup + max(self.clean / self.devices, self.reading) + self.opening


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
    """A device: those aboard by the pass at which each ends, and its passes up to the moment `since`."""

    active: list[tuple[int, int, float]] = field(default_factory=list)
    load: float = 0.0
    done: int = 0
    since: float = 0.0
    until: int = 0
    version: int = 0
    passes: int = 0
    waited: float = 0.0

    def take(self, number: int, job: Job) -> None:
        """Take an image aboard."""
        passes = max(job.passes, 1)
        heapq.heappush(self.active, (self.done + passes, number, job.work / passes))
        self.load += job.work / passes

    def advance(self, passes: int) -> None:
        """Have done so many more."""
        self.done += passes
        self.passes += passes

    def land(self) -> int:
        """Let those go that are through; return how many."""
        count = 0
        while self.active and self.active[0][0] <= self.done:
            self.load -= heapq.heappop(self.active)[2]
            count += 1
        if not self.active:
            self.load = 0.0
        return count


class _Run:
    """One simulation, event by event."""

    def __init__(self, jobs: Iterable[Job], site: Site) -> None:
        self.site, self.queue = site, deque(enumerate(jobs))
        self.left = len(self.queue)
        self.begin = site.begin
        self.free_at = self.begin
        self.last = self.begin
        self.devices = [_Device() for _ in range(site.devices)]
        self.events = [(self.begin, number, 0) for number in range(site.devices)]
        self.idle = set[int]()
        self.split_at = -math.inf

    @property
    def alone(self) -> bool:
        return self.site.devices == 1

    def go(self) -> None:
        """Do everything."""
        while self.left:
            now, number, version = heapq.heappop(self.events)
            if number < 0:
                self._split(now)
            elif version == self.devices[number].version:
                self._look(now, number)

    def _look(self, now: float, number: int) -> None:
        """Let land what is through, ask for more, begin the next passes."""
        site, device = self.site, self.devices[number]
        device.advance(device.until)
        finished = device.land()
        self.left -= finished
        if finished:
            self.last = max(self.last, now)
            self.free_at = max(self.free_at, now) + site.message * (not self.alone) + finished * site.verdict
        asks = bool(self.queue) and len(device.active) < site.slots
        after = self.free_at if self.alone else now
        if asks:
            count = min(site.slots - len(device.active), len(self.queue))
            if not self.alone:
                count = min(count, max(1, len(self.queue) // (SHARES * site.devices)))
            after = max(self.free_at, now) + site.message * (not self.alone) + count * site.handout
            self.free_at = after
            for _ in range(count):
                device.take(*self.queue.popleft())
        device.waited += max(after - now, 0.0)
        self._begin(max(after, now), number)

    def _begin(self, now: float, number: int) -> None:
        """Have a device go on from now, until the first lands or it may ask again."""
        site, device = self.site, self.devices[number]
        device.version += 1
        device.since = now
        if not device.active:
            device.until = 0
            self.idle.add(number)
            if not self.queue:
                heapq.heappush(self.events, (max(now, self.split_at + SPLIT_EVERY), -1, 0))
            return
        self.idle.discard(number)
        device.until = device.active[0][0] - device.done
        if self.queue and len(device.active) < site.slots:
            device.until = 1
        step = site.overhead + device.load
        heapq.heappush(self.events, (now + device.until * step, number, device.version))

    def _split(self, now: float) -> None:
        """Have the device with most on board give every other image to one that has none."""
        if not self.idle or now < self.split_at + SPLIT_EVERY:
            return
        number = max(range(len(self.devices)), key=lambda at: len(self.devices[at].active))
        giver = self.devices[number]
        if len(giver.active) < WORTH_SPLITTING:
            return
        self.split_at = now
        step = self.site.overhead + giver.load
        passes = min(giver.until, math.ceil(max(now - giver.since, 0.0) / step)) if step else giver.until
        if passes < giver.until:
            at = giver.since + passes * step
            giver.advance(passes)
            taker_number = min(self.idle)
            taker = self.devices[taker_number]
            rows = sorted(giver.active)
            giver.active, given = rows[::2], rows[1::2]
            taker.active = [(end - giver.done + taker.done, index, rate) for end, index, rate in given]
            for device in (giver, taker):
                device.load = sum(rate for *_, rate in device.active)
            after = at + self.site.message
            self._begin(after, number)
            self._begin(after, taker_number)
        if self.idle:
            heapq.heappush(self.events, (now + SPLIT_EVERY, -1, 0))


def simulate(jobs: Iterable[Job], site: Site) -> Course:
    """Return how a run of these images goes, handed out in their order."""
    jobs = list(jobs)
    run = _Run(jobs, site)
    run.go()
    seconds = max(run.last, run.free_at)
    whole = site.devices * seconds
    if not whole:
        return Course(0.0, dict.fromkeys(PARTS, 0.0))
    start = min(site.startup, run.begin)
    spent = {
        "work": sum(job.work for job in jobs),
        "passes": site.overhead * sum(device.passes for device in run.devices),
        "start": site.devices * start,
        "clean": site.devices * (run.begin - start),
        "driver": sum(device.waited for device in run.devices) + site.devices * (seconds - run.last),
    }
    if run.alone:
        spent["driver"] = len(jobs) * (site.handout + site.verdict)
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
    driver = site.handout + site.verdict
    own = each + site.overhead * passes / site.slots
    pace = own + driver if site.devices == 1 else max(own / site.devices, driver)
    seconds = course.seconds + more * pace
    grown = {name: share * course.seconds for name, share in course.shares.items()}
    grown["work"] += more * each / site.devices
    grown["passes"] += more * (own - each) / site.devices
    grown["driver"] += more * (pace - own / site.devices)
    return Course(seconds, {name: value / seconds for name, value in grown.items()})
