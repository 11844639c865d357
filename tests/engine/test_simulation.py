"""The simulation of runs on several devices against closed forms."""

from __future__ import annotations

import random

import pytest

from robustkit.engine.planning.simulation import PARTS, Job, Site, extended, simulate

DEVICES = (1, 2, 3, 5, 8, 20, 64)


def mixed(count: int, seed: int = 0) -> list[Job]:
    """Images of which some fall early and some last long."""
    rng = random.Random(seed)
    return [Job(0.05, 5) if rng.random() < 0.7 else Job(2.0 * rng.random(), 200) for _ in range(count)]


@pytest.mark.parametrize("devices", DEVICES)
@pytest.mark.parametrize("passes", [1, 7])
def test_equal_images_run_in_equal_rounds(devices: int, passes: int) -> None:
    result = simulate([Job(3.0, passes)] * 10, Site(devices, slots=1))
    assert result.seconds == pytest.approx(-(-10 // devices) * 3.0)
    assert result.shares["work"] == pytest.approx(30 / (devices * result.seconds))


def test_a_pass_takes_a_fixed_time_and_the_time_of_its_images() -> None:
    # 10 images of 4 passes, 5 on board: twice 4 passes of 0.5 s and 5 x 0.1 s.
    result = simulate([Job(0.4, 4)] * 10, Site(1, slots=5, overhead=0.5))
    assert result.seconds == pytest.approx(2 * 4 * (0.5 + 5 * 0.1))
    assert result.shares["passes"] == pytest.approx(0.5)


@pytest.mark.parametrize("devices", DEVICES)
def test_the_longest_image_bounds_the_time(devices: int) -> None:
    jobs = [Job(0.01, 2)] * 50 + [Job(9.0, 900)]
    result = simulate(jobs, Site(devices, slots=8, overhead=0.01))
    assert result.seconds >= 9.0 + 900 * 0.01 - 1e-9
    if devices > 2:
        assert result.seconds < 1.2 * (9.0 + 900 * 0.01)
    if devices > 3:
        assert result.bound == "tail"


@pytest.mark.parametrize("seed", range(3))
def test_the_speed_up_is_at_most_the_number_of_devices(seed: int) -> None:
    jobs = mixed(400, seed)
    longest = max(job.work + 0.001 * job.passes for job in jobs)
    before = None
    first = simulate(jobs, Site(1, 16, 0.001)).seconds
    for devices in DEVICES:
        result = simulate(jobs, Site(devices, 16, 0.001))
        assert sum(result.shares.values()) == pytest.approx(1)
        assert tuple(result.shares) == PARTS
        assert min(result.shares.values()) >= 0
        assert first / (devices * result.seconds) <= 1 + 1e-9
        assert result.seconds >= sum(job.work for job in jobs) / devices - 1e-9
        # Whoever is unlucky with the last image may be late by it.
        assert before is None or result.seconds <= before + longest
        before = result.seconds


def test_the_last_images_are_divided_among_devices() -> None:
    # 64 images are on board of the first to ask, unless some are given away.
    jobs = [Job(1.0, 100)] * 64
    result = simulate(jobs, Site(4, slots=64, overhead=0.001))
    assert result.seconds < 1.4 * 64 / 4


def test_start_up_and_driver_time_bound_the_speed_up() -> None:
    jobs = [Job(0.1, 1)] * 100
    late = simulate(jobs, Site(50, slots=4, startup=20.0, opening=5.0))
    assert late.bound == "start"
    assert late.seconds == pytest.approx(20 + 5 + 0.2)
    waiting = simulate(jobs, Site(50, slots=4, startup=5.0, opening=20.0))
    assert waiting.bound == "clean"
    served = simulate(jobs, Site(50, slots=4, handout=1.0, verdict=0.5))
    assert served.bound == "driver"
    assert served.seconds >= 100 * 1.5
    alone = simulate(jobs, Site(1, slots=4, startup=1.0, opening=2.0, handout=0.01, verdict=0.02))
    assert alone.seconds == pytest.approx(1 + 2 + 100 * (0.1 + 0.03))


@pytest.mark.parametrize("devices", [1, 4])
def test_images_beyond_the_simulated_ones_run_at_the_steady_rate(devices: int) -> None:
    site = Site(devices, slots=8, overhead=0.01, startup=2.0)
    whole = simulate(mixed(8000), site)
    part = extended(mixed(2000), site, 8000)
    assert part.seconds == pytest.approx(whole.seconds, rel=0.1)
    assert sum(part.shares.values()) == pytest.approx(1)
    assert part.shares["work"] == pytest.approx(whole.shares["work"], abs=0.1)


def test_no_images_take_no_time() -> None:
    assert simulate([], Site(2, slots=4)).seconds == 0
