"""Attacks on 50,000 images of ImageNet's size by 8 to 512 devices, simulated with the engine's own rules.

    python scripts/benchmarks/simulate_workers.py

Assumed: a pass of a row takes 0.5 ms and a pass of any batch 10 ms more; 55 % of the images are fooled within 20
passes, 5 % within 400, the others take all 630 of `rapid`; workers read the files. The driver's costs are those of
`robustkit plan`. Start-up, clean pass and checks are left out.
"""

from __future__ import annotations

import random

from robustkit.engine.planning.forecast import HANDOUT, MESSAGE, VERDICT, VERDICT_BYTE
from robustkit.engine.planning.simulation import Job, Site, simulate

IMAGES, SLOTS = 50_000, 512
ROW_SECONDS, PASS_SECONDS = 0.5e-3, 0.01
FOOLED, IMAGE_BYTES = 0.6, 4 * 3 * 224 * 224


def images() -> list[Job]:
    """Return what each image costs."""
    rng, jobs = random.Random(0), []
    for _ in range(IMAGES):
        share = rng.random()
        passes = rng.randint(1, 20) if share < 0.55 else rng.randint(20, 400) if share < 0.6 else 630
        jobs.append(Job(passes * ROW_SECONDS, passes))
    return jobs


def main() -> None:
    """Print seconds, the share of the devices' own pace, and what most of the rest of the time goes to."""
    jobs = images()
    for name, writing in (
        ("ledger", FOOLED * IMAGE_BYTES * VERDICT_BYTE),
        ("ledger on a disk without limit", 0.0),
    ):
        alone = 0.0
        for devices in (1, 8, 32, 64, 512):
            site = Site(
                devices, SLOTS, PASS_SECONDS, handout=HANDOUT, verdict=VERDICT, message=MESSAGE, writing=writing
            )
            course = simulate(jobs, site)
            alone = alone or course.seconds - IMAGES * writing
            pace = alone / (devices * course.seconds)
            print(f"{name}: {devices:3} devices {course.seconds:6.0f} s, {100 * pace:3.0f} % ({course.bound})")


if __name__ == "__main__":
    main()
