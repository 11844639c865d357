"""The forecast of an evaluation's cost and time from a cost probe, on one device and on several."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from statistics import fmean

import numpy as np

from robustkit.core.errors import UsageError
from robustkit.core.intervals import mean_cost_interval
from robustkit.engine.planning.arm_costs import SimulatedRounds, forecast
from robustkit.engine.planning.cost_probe import CostProbe, ProbeResult
from robustkit.engine.planning.simulation import Course, Job, Site, extended, joined
from robustkit.engine.progress import Progress
from robustkit.registry import suite_text
from robustkit.runs.environment import environment
from robustkit.runs.forecast_record import (
    DEVICES,
    Estimate,
    Memory,
    Plan,
    Scale,
    Speed,
    Trial,
    refuse_devices,
)

# Images beyond these numbers per slot and in all do not change the result of the simulation.
MAX_ROUNDS, MAX_SIMULATED = 4, 20_000
# Seconds until a worker process can load the model (docs/scale.md: 5.9 to 8.6 with the model).
SPAWN_SECONDS = 5.0
# Seconds of the main process for a message, for an image sent and for a verdict written, and of the last two for
# each byte of the image: measured on one core of an AMD EPYC.
MESSAGE, HANDOUT, HANDOUT_BYTE, VERDICT, VERDICT_BYTE = 3.3e-4, 1e-5, 1e-9, 9e-5, 5e-9


def forecast_cost(
    probe: CostProbe,
    devices: Sequence[int] = DEVICES,
    price: float | None = None,
    progress: Progress | None = None,
) -> Plan:
    """Measure, and return the cost of the evaluation on each of these numbers of devices.

    Args:
        probe: the evaluation, and how long to measure.
        devices: how many to look at.
        price: of a device for an hour.
        progress: receives messages.

    Raises:
        UsageError: for a request that cannot be carried out.
        RunError: if the probe fails.
    """
    refuse_devices(devices, ",".join(map(str, devices)))
    if price is not None and not 0 <= price < float("inf"):
        raise UsageError(f"price {price:g}: it must be the price of a device for an hour, e.g. 2.5.")
    n = len(probe.samples)
    progress = progress or Progress()
    progress.say(f"measuring: the checks, then {probe.budget:g} s of attacks")
    found = probe.measure(progress)
    costs, simulations = Costs.of(found, n), list[SimulatedRounds]()
    if found.arms is not None:
        progress.say(f"simulating the rounds of {n:,} images")
        simulations = forecast(found.arms, n, probe.allowed_doubt, probe.seed)
    arms = _each(simulations, n)
    alone = _courses(costs, simulations, found, probe, 1)
    scales = []
    for count in devices:
        courses = alone if count == 1 else _courses(costs, simulations, found, probe, count)
        value, low, high = (course.seconds for course in courses)
        seconds = Estimate(value, min(low, value), max(high, value))
        hours = seconds.times(count / 3600)
        scales.append(
            Scale(
                devices=count,
                seconds=seconds,
                device_hours=hours,
                money=None if price is None else hours.times(price),
                efficiency=alone[0].seconds / (count * value),
                shares=courses[0].shares,
                bound=courses[0].bound,
            )
        )
    instrumented, speed = found.instrumented, found.speed
    most = costs.most
    if most is not None and found.arms is not None:
        most += int(found.arms.most[:, :2].sum())
    return Plan(
        model=probe.model.string,
        data=probe.samples.name,
        n=n,
        threat=str(probe.threat),
        suite=suite_text(probe.suite),
        seed=probe.seed,
        trial=Trial(len(found.finished), int(found.finished.sum()), found.robust, found.seconds),
        speed=Speed(speed.forward, speed.both, speed.fixed, speed.at_once, instrumented.precision),
        propagations=costs.mean if arms is None else costs.mean.plus(arms),
        arms=arms,
        most=most,
        memory=Memory(found.memory_before, found.memory_peak),
        price=price,
        scales=scales,
        environment=environment(
            probe.device, instrumented.precision, instrumented.micro_batch, instrumented.threads
        ),
    )


@dataclass(frozen=True)
class Costs:
    """What images cost: a job for each of the probe, the most expensive one possible, and mean passes.

    An image that the probe left unfinished costs at least what it has spent, and at most what the attacks may
    spend; it is taken to be halfway on a logarithmic scale.
    """

    jobs: list[Job]
    worst: Job | None
    mean: Estimate
    most: int | None

    @classmethod
    def of(cls, found: ProbeResult, n: int) -> Costs:
        """Return the costs of n images from a probe of some of them.

        Raises:
            UsageError: if the probe has too few results.
        """
        units = (found.forwards + found.backwards).astype(float)
        open_ones = int((~found.finished).sum())
        spent = max(sum(found.unfinished) / max(open_ones, 1), 1.0)
        if found.max_costs is None and open_ones:
            raise UsageError(
                f"{open_ones} of {len(units)} images were not done in time, and not all of these attacks say how "
                "long they may last; measure longer with --seconds."
            )
        worst, most = None, None
        jobs = [
            Job(_work(found, *counts), int(passes))
            for *counts, passes in zip(found.forwards, found.backwards, found.passes, strict=True)
        ]
        lows, highs, values = units.copy(), units.copy(), units.copy()
        if found.max_costs is not None:
            most = found.max_costs[0] + found.max_costs[1]
            worst = Job(_work(found, *found.max_costs[:2]), found.max_costs[2])
            spent = min(spent, most)
            middle = math.sqrt(spent * most)
            lows[~found.finished], highs[~found.finished], values[~found.finished] = spent, most, middle
            halfway = Job(worst.work * middle / most, math.ceil(worst.passes * middle / most))
            jobs = [job if done else halfway for job, done in zip(jobs, found.finished, strict=True)]
        low, high = mean_cost_interval(lows.tolist(), highs.tolist(), n, float(most or highs.max()))
        value = float(values.mean())
        return cls(jobs, worst, Estimate(value, min(low, value), max(high, value)), most)

    def sample(self, count: int, seed: int) -> tuple[list[Job], list[Job], list[Job]]:
        """Return so many images: like the probe's, and at both ends of the interval for their mean.

        At its low end some of them cost nothing, at its high end some have the largest possible cost.
        """
        rng = random.Random(seed)
        like = [self.jobs[index % len(self.jobs)] for index in range(count)]
        rng.shuffle(like)
        value, low, high = self.mean.value, self.mean.low, self.mean.high
        free = 1 - low / value if value else 0.0
        if self.most is None or self.worst is None:
            more = high / value if value else 1.0
            return like, _mixed(like, Job(0.0, 0), free, rng), [Job(more * job.work, job.passes) for job in like]
        dear = (high - value) / (self.most - value) if self.most > value else 0.0
        return like, _mixed(like, Job(0.0, 0), free, rng), _mixed(like, self.worst, dear, rng)


def site(found: ProbeResult, probe: CostProbe, devices: int) -> Site:
    """Return the site of so many devices like the one measured."""
    n, slots = len(probe.samples), found.slots
    if devices == 1:
        return Site(1, slots, found.overhead, found.start, found.checks + found.clean * n)
    entered = int((found.finished & (found.forwards > 0)).sum())
    fooled = 1 - found.robust / max(entered, 1)
    # Workers read image files themselves; arrays are sent to them.
    sent = 0.0 if probe.samples.source.slow else found.read + found.image_bytes * HANDOUT_BYTE
    return Site(
        devices=devices,
        slots=slots,
        overhead=found.overhead,
        startup=SPAWN_SECONDS + found.start,
        opening=found.checks,
        clean=found.clean * n,
        handout=HANDOUT + sent,
        verdict=VERDICT,
        writing=fooled * found.image_bytes * VERDICT_BYTE,
        message=MESSAGE,
    )


def _each(simulations: Sequence[SimulatedRounds], n: int) -> Estimate | None:
    """Return the passes of the arms per image; None for a suite without arms."""
    if not simulations:
        return None
    costs = [simulation.cost / n for simulation in simulations]
    return Estimate(fmean(costs), costs[0], costs[-1])


def _courses(
    costs: Costs, simulations: Sequence[SimulatedRounds], found: ProbeResult, probe: CostProbe, devices: int
) -> list[Course]:
    """Return the simulated runs as expected, and with images and arms at both ends of their intervals."""
    machine = site(found, probe, devices)
    courses = _ordinary(costs, found, probe, machine)
    if found.arms is None or not simulations:
        return courses
    passes = found.arms.most[:, 2].astype(int)

    def seconds(simulation: SimulatedRounds) -> float:
        steps = sum(math.ceil(count / machine.slots) * passes[arm] for arm, count in simulation.rounds)
        work = sum(count * _work(found, *simulation.spent[arm]) for arm, count in simulation.rounds)
        return float(found.overhead * steps + work)

    simulations = sorted(simulations, key=seconds)
    ends = (simulations[len(simulations) // 2], simulations[0], simulations[-1])
    return [
        joined([course, *_rounds(simulation, passes, found, machine)])
        for course, simulation in zip(courses, ends, strict=True)
    ]


def _rounds(simulation: SimulatedRounds, passes: np.ndarray, found: ProbeResult, machine: Site) -> list[Course]:
    """Return the simulated runs of the rounds, one after another."""
    machine = replace(machine, startup=0.0, opening=0.0, clean=0.0)
    most = min(MAX_SIMULATED, MAX_ROUNDS * machine.devices * machine.slots)

    @cache
    def course(arm: int, count: int) -> Course:
        job = Job(_work(found, *simulation.spent[arm]), int(passes[arm]))
        return extended([job] * min(count, most), machine, count)

    return [course(arm, count) for arm, count in simulation.rounds]


def _ordinary(costs: Costs, found: ProbeResult, probe: CostProbe, machine: Site) -> list[Course]:
    """Return the simulated runs without the arms, as expected and at both ends."""
    devices, n = machine.devices, len(probe.samples)
    count = min(n, max(MAX_SIMULATED, MAX_ROUNDS * devices * machine.slots))
    # A misclassified clean image is done after the clean pass.
    lists = [[job for job in jobs if job.passes] for jobs in costs.sample(count, probe.seed)]
    totals = [round(n * len(jobs) / count) for jobs in lists]
    if not any(entry.attack.info.coupled for entry in probe.entries if not entry.conditional):
        return [extended(jobs, machine, total) for jobs, total in zip(lists, totals, strict=True)]
    # Attacks whose random numbers depend on the batch are sent batch by batch.
    batch = probe.chunk_size
    whole = replace(machine, slots=1, handout=machine.handout * batch, verdict=machine.verdict * batch)
    return [
        extended(_batches(jobs, batch), whole, math.ceil(total / batch))
        for jobs, total in zip(lists, totals, strict=True)
    ]


def _batches(jobs: list[Job], size: int) -> list[Job]:
    parts = [jobs[index : index + size] for index in range(0, len(jobs), size)]
    return [Job(sum(job.work for job in part), max(job.passes for job in part)) for part in parts]


def _mixed(jobs: list[Job], other: Job, share: float, rng: random.Random) -> list[Job]:
    """Return the jobs with this share of them, drawn at random, replaced by another."""
    changed = set(rng.sample(range(len(jobs)), min(len(jobs), round(share * len(jobs)))))
    return [other if index in changed else job for index, job in enumerate(jobs)]


def _work(found: ProbeResult, forwards: float, backwards: float) -> float:
    """Return the seconds of so many passes in full batches."""
    forward, backward = found.speed.marginal
    return float(forwards * forward + backwards * backward) * found.drag
