"""Kill an evaluation with SIGKILL at random moments until it is done; compare with an unbroken one.

    python scripts/kill_and_resume.py --kills 20 --out /tmp/kills

Starts `robustkit evaluate` on the built-in net again and again, kills it after a random time, looks at the
ledger after each kill, and at the end compares report.json (times aside) and adversarial.npz byte for byte
with a run that nobody disturbed. Fails if a chunk that was in the ledger changes or is done again. About 4
minutes for 20 kills on 2 cores.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import time
from pathlib import Path

from filelock import FileLock, Timeout

from robustkit.engine.folder import read_spec
from robustkit.errors import UsageError
from robustkit.ledger import Ledger

SUITE = "pgd(steps=30),autoattack:apgd-ce(steps=20),autoattack:square(queries=100)"
COMMAND = [sys.executable, "-m", "robustkit", "evaluate", "--limit", "64", "--batch-size", "4", "--no-html"]
# Left to itself the search chooses its precision by the clock.
COMMAND += ["--precision", "fp32"]
COMMAND += ["--threat", "linf:0.12", "--suite", SUITE]


def chunks(path: Path) -> dict[tuple[int, int], float]:
    """Return the chunks in a run folder's ledger with their seconds, which no second run would repeat."""
    try:
        with Ledger.open(path / "ledger.sqlite", read_spec(path).run_id) as ledger:
            return {(chunk.stage, chunk.chunk): chunk.seconds for chunk in ledger.chunks()}
    except UsageError:
        if (path / "spec.json").exists():
            raise
        return {}


def timeless(path: Path) -> str:
    """Return report.json without times, and without the hash of the ledger, which holds times."""
    body = json.loads((path / "report.json").read_text())
    for cost in [*body["stages"], body["cost"]]:
        cost.pop("seconds")
    body["files"].pop("ledger.sqlite")
    del body["environment"]  # how full the device was is the last session's own
    return json.dumps(body)


def wait_until_it_works(path: Path, process: subprocess.Popen[bytes]) -> None:
    """Return once the process holds the run folder's lock, or has ended."""
    while process.poll() is None:
        try:
            with FileLock(path / ".lock", timeout=0):
                pass
        except (Timeout, FileNotFoundError) as error:
            if isinstance(error, Timeout):
                return
        time.sleep(0.02)


def main() -> None:
    """Run both, print each kill and the comparison; exit 1 if they differ."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    whole, killed = arguments.out / "whole", arguments.out / "killed"
    subprocess.run([*COMMAND, "--out", str(whole)], check=True, capture_output=True)
    work = json.loads((whole / "report.json").read_text())["cost"]["seconds"]
    dice = random.Random(arguments.seed)
    known: dict[tuple[int, int], float] = {}
    for number in range(arguments.kills):
        process = subprocess.Popen(
            [*COMMAND, "--out", str(killed)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        # One in four hits the start, the others the work; it takes several to get through the work.
        if number % 4 == 0:
            time.sleep(dice.uniform(0.1, 3))
        else:
            wait_until_it_works(killed, process)
            time.sleep(dice.uniform(0, work / 8))
        process.kill()
        process.wait()
        now = chunks(killed) if (killed / "ledger.sqlite").exists() else {}
        if not known.items() <= now.items():
            sys.exit(f"kill {number + 1}: a finished chunk was lost or done again")
        print(f"kill {number + 1}: {len(now)} chunks in the ledger, {len(now) - len(known)} new", flush=True)
        known = now
        if (killed / "report.json").exists():
            print("finished between the kills; starting over in the same folder's place")
            known = {}
            for file in killed.iterdir():
                file.unlink()
    subprocess.run([*COMMAND, "--out", str(killed)], check=True, capture_output=True)
    if not known.items() <= chunks(killed).items():
        sys.exit("the last run did a finished chunk again")
    if timeless(whole) != timeless(killed):
        sys.exit("the reports differ")
    if (whole / "adversarial.npz").read_bytes() != (killed / "adversarial.npz").read_bytes():
        sys.exit("the adversarials differ")
    print(f"after {arguments.kills} kills: same report (times aside), same adversarial.npz, no chunk done twice")


if __name__ == "__main__":
    main()
