"""Kill workers, and now and then the driver, of an evaluation at random; compare with an undisturbed one.

    python scripts/tools/kill_workers.py --kills 20 --out /tmp/kill_workers

Starts `robustkit evaluate --workers 2` on the built-in net and sends SIGKILL at random moments: to a worker, or,
every fourth time, to the driver, after which the same command goes on. At the end report.json (times and passes
aside) has to be that of a run with one process, no chunk that was in the ledger may have changed, and no image may
have two verdicts of one attack. What the kills cost is lost with the dead and in no ledger. About 6 minutes for 20
kills on 2 cores.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from robustkit.core.errors import UsageError
from robustkit.runs.ledger import Ledger
from robustkit.runs.run_folder import read_spec

SUITE = (
    "pgd(steps=30),autoattack:apgd-ce(steps=20),autoattack:square(queries=200),apgd(steps=50),square(queries=400)"
)
COMMAND = [sys.executable, "-m", "robustkit", "evaluate", "--batch-size", "4", "--no-html"]
# Left to itself the search chooses its precision by the clock.
COMMAND += ["--precision", "fp32", "--threat", "linf:0.12", "--suite", SUITE]
# Margins of the same point from batches of different sizes differ by rounding.
TOLERANCE = 1e-4
DRIVER_EVERY = 4


def chunks(path: Path) -> dict[tuple[int, int], tuple[float, list[int]]]:
    """Return the chunks in a run folder's ledger: their seconds, which no second run would repeat, and images."""
    try:
        with Ledger.open(path / "ledger.sqlite", read_spec(path).run_id) as ledger:
            return {
                (chunk.stage, chunk.chunk): (chunk.seconds, [verdict.position for verdict in chunk.verdicts])
                for chunk in ledger.chunks()
            }
    except UsageError:
        if (path / "spec.json").exists():
            raise
        return {}


def verdicts(path: Path) -> tuple[Any, list[float]]:
    """Return all that report.json says but for times, passes and margins; and the margins."""
    body = json.loads((path / "report.json").read_text())
    for cost in [*body["stages"], body["cost"]]:
        for name in ("seconds", "forwards", "backwards"):
            cost.pop(name)
    del body["environment"], body["files"]
    return body, [verdict.pop("margin") for verdict in body["verdicts"]]


def passes(path: Path) -> int:
    """Return the passes that a report counts."""
    cost = json.loads((path / "report.json").read_text())["cost"]
    return int(cost["forwards"] + cost["backwards"])


def workers(driver: int) -> list[int]:
    """Return the processes that a driver has started to work for it (Linux)."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(status.read_text().rpartition(")")[2].split()[1])
            command = (status.parent / "cmdline").read_bytes()
        except (OSError, IndexError, ValueError):
            continue
        if parent == driver and b"spawn_main" in command:
            found.append(int(status.parent.name))
    return found


def main() -> int:
    """Return 0 if nothing was lost but what was in work."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--limit", type=int, default=64, help="images")
    parser.add_argument("--wait", type=float, default=12.0, help="most seconds between two kills")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    command = [*COMMAND, "--limit", str(arguments.limit)]
    alone, shared = arguments.out / "alone", arguments.out / "shared"
    subprocess.run([*command, "--out", str(alone)], check=True, stdout=subprocess.DEVNULL)
    rng, killed, drivers, runs = random.Random(arguments.seed), 0, 0, 0
    known: dict[tuple[int, int], tuple[float, list[int]]] = {}
    while not (shared / "report.json").exists():
        runs += 1
        process = subprocess.Popen(
            [*command, "--workers", "2", "--out", str(shared)], stdout=subprocess.DEVNULL, stderr=sys.stderr
        )
        while process.poll() is None:
            if killed == arguments.kills:
                process.wait()
                break
            time.sleep(rng.uniform(0.2, arguments.wait))
            if (killed + 1) % DRIVER_EVERY == 0:
                process.kill()
                drivers += process.wait() < 0
                killed += 1
            elif hands := workers(process.pid):
                subprocess.run(["kill", "-9", str(rng.choice(hands))], check=False)
                killed += 1
        now = chunks(shared)
        if not known.items() <= now.items():
            print("FAILED: a chunk that was in the ledger has changed")
            return 1
        known = now
    images = [(stage, at) for (stage, _), (_, positions) in known.items() for at in positions]
    if len(images) != len(set(images)):
        print("FAILED: an image was judged twice in one stage")
        return 1
    (one, margins), (other, others) = verdicts(alone), verdicts(shared)
    apart = max(abs(a - b) for a, b in zip(margins, others, strict=True))
    print(f"{killed} kills, {drivers} of them of the driver, {runs} runs; {len(known)} chunks, none done twice")
    print(f"passes in the ledger: {passes(shared):,}, of one process: {passes(alone):,}")
    print(f"reports {'equal' if one == other else 'DIFFER'}; margins at most {apart:.1e} apart")
    return 0 if one == other and apart <= TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main())
