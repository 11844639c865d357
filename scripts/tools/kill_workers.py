"""Kill workers, nodes and drivers of an evaluation at random; compare with an undisturbed one.

    python scripts/tools/kill_workers.py --kills 20 --out /tmp/kill_workers
    python scripts/tools/kill_workers.py --kills 20 --ray --out /tmp/kill_workers_ray

Starts `robustkit evaluate` with two workers on the built-in net and sends SIGKILL at random moments: to a worker,
or, every fourth time, to the driver, after which the same command is started again. With --ray the workers are on
a cluster of two nodes on this machine, and every fifth time the second node is removed and a new one added. At the
end report.json (times and passes aside) has to be that of a run with one process, no chunk that was in the ledger
may have changed, and no image may have two verdicts of one attack. What the kills cost is lost with the dead and
in no ledger. Workers have to be gone a few seconds after their driver. About 6 minutes for 20 kills on 2 cores.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
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
DRIVER_EVERY, NODE_EVERY = 4, 5
# Command lines of workers.
WORKERS = (b"spawn_main", b"ray::_Actor")
# Seconds after which workers without a driver have to be gone.
MAX_SECONDS_ALONE = 15.0


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


def workers(root: int) -> list[int]:
    """Return the workers among the processes below one (Linux)."""
    parents, found = {}, []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(status.parent.name)] = int(status.read_text().rpartition(")")[2].split()[1])
            if any(name in (status.parent / "cmdline").read_bytes() for name in WORKERS):
                found.append(int(status.parent.name))
        except (OSError, IndexError, ValueError):
            continue
    return [pid for pid in found if root in _above(pid, parents)]


def _above(pid: int, parents: dict[int, int]) -> Iterator[int]:
    while pid := parents.get(pid, 0):
        yield pid


def seconds_until_gone(pids: list[int]) -> float:
    """Return how long it takes until all of these processes have ended."""
    begun = time.monotonic()
    while any(Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_bytes() for pid in pids):
        if time.monotonic() - begun > MAX_SECONDS_ALONE:
            return float("inf")
        time.sleep(0.05)
    return time.monotonic() - begun


class Processes:
    """Two workers that are processes of this machine."""

    words = ("--workers", "2")

    def workers(self, driver: int) -> list[int]:
        """Return the workers of a driver."""
        return workers(driver)

    def close(self) -> None:
        """Do nothing: they end with their driver."""


class Nodes:
    """Two workers on a Ray cluster of two nodes, one of which can be removed."""

    def __init__(self) -> None:
        """Start the cluster."""
        from ray.cluster_utils import Cluster

        os.environ["RAY_worker_niceness"] = "0"
        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
        self.node = self.cluster.add_node(num_cpus=1)
        self.words = ("--ray", self.cluster.address, "--workers", "2")

    def workers(self, driver: int) -> list[int]:
        """Return all workers of the cluster."""
        return workers(os.getpid())

    def replace_node(self) -> None:
        """Remove the second node, as a machine that fails, and add another."""
        self.cluster.remove_node(self.node, allow_graceful=False)
        self.node = self.cluster.add_node(num_cpus=1)

    def close(self) -> None:
        """End the cluster."""
        self.cluster.shutdown()


@dataclass
class Kills:
    """What was killed so far."""

    workers: int = 0
    nodes: int = 0
    drivers: int = 0
    seconds_alone: float = 0.0

    @property
    def total(self) -> int:
        """How many kills there were."""
        return self.workers + self.nodes + self.drivers


def kill_one(pool: Processes | Nodes, driver: subprocess.Popen[bytes], kills: Kills, rng: random.Random) -> None:
    """Kill a driver, a node or a worker, whichever is next."""
    found = pool.workers(driver.pid)
    if (kills.total + 1) % DRIVER_EVERY == 0:
        driver.kill()
        if driver.wait() < 0:
            kills.drivers += 1
            kills.seconds_alone = max(kills.seconds_alone, seconds_until_gone(found))
    elif isinstance(pool, Nodes) and (kills.total + 1) % NODE_EVERY == 0:
        pool.replace_node()
        kills.nodes += 1
    elif found:
        with suppress(ProcessLookupError):
            os.kill(rng.choice(found), signal.SIGKILL)
            kills.workers += 1


def main() -> int:
    """Return 0 if nothing was lost but what was in work."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--limit", type=int, default=64, help="images")
    parser.add_argument("--wait", type=float, default=12.0, help="most seconds between two kills")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ray", action="store_true", help="workers on a Ray cluster of two nodes on this machine")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    command = [*COMMAND, "--limit", str(options.limit)]
    alone = options.out / "alone"
    subprocess.run([*command, "--out", str(alone)], check=True, stdout=subprocess.DEVNULL)
    rng, kills, rounds = random.Random(options.seed), Kills(), 0
    with closing(Nodes() if options.ray else Processes()) as pool:
        while kills.total < options.kills:
            rounds += 1
            shared = options.out / f"shared-{rounds}"
            if fault := disturb([*command, *pool.words], shared, pool, kills, options, rng) or compare(
                alone, shared
            ):
                print(f"FAILED: {fault}")
                return 1
    print(
        f"{kills.total} kills: {kills.workers} of workers, {kills.nodes} of nodes, {kills.drivers} of drivers, "
        f"in {rounds} evaluations; no chunk done twice, all reports equal"
    )
    print(f"workers gone at most {kills.seconds_alone:.1f} s after their driver")
    return 0 if kills.seconds_alone <= MAX_SECONDS_ALONE else 1


def disturb(
    command: Sequence[str],
    shared: Path,
    pool: Processes | Nodes,
    kills: Kills,
    options: argparse.Namespace,
    rng: random.Random,
) -> str:
    """Run one evaluation to its end, with kills; return what went wrong."""
    known: dict[tuple[int, int], tuple[float, list[int]]] = {}
    while not (shared / "report.json").exists():
        driver = subprocess.Popen([*command, "--out", str(shared)], stdout=subprocess.DEVNULL)
        while driver.poll() is None and kills.total < options.kills:
            time.sleep(rng.uniform(0.2, options.wait))
            kill_one(pool, driver, kills, rng)
        if driver.wait() > 0:
            return f"the evaluation ended with exit code {driver.returncode}"
        now = chunks(shared)
        if not known.items() <= now.items():
            return "a chunk that was in the ledger has changed"
        known = now
    images = [(stage, position) for (stage, _), (_, positions) in known.items() for position in positions]
    return "an image has two verdicts in one stage" if len(images) != len(set(images)) else ""


def compare(alone: Path, shared: Path) -> str:
    """Print how two runs differ; return what is wrong with it."""
    (one, margins), (other, others) = verdicts(alone), verdicts(shared)
    apart = max(abs(a - b) for a, b in zip(margins, others, strict=True))
    print(
        f"passes in the ledger: {passes(shared):,}, of one process: {passes(alone):,}; margins {apart:.1e} apart"
    )
    return "the reports differ" if one != other or apart > TOLERANCE else ""


if __name__ == "__main__":
    sys.exit(main())
