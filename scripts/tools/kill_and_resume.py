"""Kill an evaluation with SIGKILL at random moments until it is done; compare with an unbroken one.

    python scripts/tools/kill_and_resume.py --kills 20 --out /tmp/kills

Starts `robustkit evaluate` on the built-in net again and again, kills it after a random time, looks at the
ledger after each kill, and at the end compares report.json (times aside) and adversarial.npz byte for byte
with an undisturbed run. Fails if a chunk that was in the ledger changes or is done again. About 4
minutes for 20 kills on 2 cores.

    python scripts/tools/kill_and_resume.py --every 40 --sleep 0.2 --out /tmp/slow

kills a net that takes so many seconds for each image, every so many seconds until the run ends; about 5 minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from robustkit.core.errors import UsageError
from robustkit.models import load_model
from robustkit.runs.ledger import Ledger
from robustkit.runs.run_folder import read_spec

SUITE = "pgd(steps=30),autoattack:apgd-ce(steps=20),autoattack:square(queries=100)"
SLOW_SUITE = "pgd(steps=5),autoattack:apgd-ce(steps=10),foolbox:LinfPGD(steps=5)"
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


def slow() -> torch.nn.Module:
    """Return the built-in net, which sleeps as long as the environment says for each image."""
    net = load_model("robustkit:digits-cnn")
    seconds = float(os.environ["SECONDS_PER_IMAGE"])
    net.register_forward_pre_hook(lambda module, images: time.sleep(seconds * len(images[0])))
    return net


def kill_every(every: float, sleep: float, workers: int, out: Path) -> None:
    """Run the slow net once without a kill and once killed every so many seconds; exit 1 if they differ."""
    command = [*COMMAND[:4], f"{__file__}:slow", "--data", "digits:test", "--limit", "4", "--no-html"]
    command += ["--precision", "fp32", "--threat", "linf:0.12", "--suite", SLOW_SUITE, "--workers", str(workers)]
    environment = {**os.environ, "SECONDS_PER_IMAGE": str(sleep)}
    whole, killed = out / "whole", out / "killed"
    begun = time.perf_counter()
    subprocess.run([*command, "--out", str(whole)], check=True, capture_output=True, env=environment)
    print(f"unbroken: {time.perf_counter() - begun:.0f} s", flush=True)
    begun, kills = time.perf_counter(), 0
    while True:
        process = subprocess.Popen(
            [*command, "--out", str(killed)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment
        )
        try:
            _, errors = process.communicate(timeout=every)
            break
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            kills += 1
            files = [file for file in (killed / ".unfinished").rglob("*") if file.is_file()]
            size, count = sum(file.stat().st_size for file in files), len(chunks(killed))
            print(f"kill {kills}: {count} chunks in the ledger, {size:,} bytes of unfinished work", flush=True)
    if process.returncode:
        sys.exit(errors.decode())
    print(f"killed every {every:g} s: {time.perf_counter() - begun:.0f} s, {kills} kills", flush=True)
    if timeless(whole) != timeless(killed):
        sys.exit("the reports differ")
    if (whole / "adversarial.npz").read_bytes() != (killed / "adversarial.npz").read_bytes():
        sys.exit("the adversarials differ")
    print("same report (times aside), same adversarial.npz")


def main() -> None:
    """Run both, print each kill and the comparison; exit 1 if they differ."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", type=float, help="seconds between two kills of a slow net")
    parser.add_argument("--sleep", type=float, default=0.1, help="seconds that it takes for an image")
    parser.add_argument("--workers", type=int, default=1, help="processes that share the work of a slow net")
    arguments = parser.parse_args()
    if arguments.every:
        return kill_every(arguments.every, arguments.sleep, arguments.workers, arguments.out)
    whole, killed = arguments.out / "whole", arguments.out / "killed"
    subprocess.run([*COMMAND, "--out", str(whole)], check=True, capture_output=True)
    work = json.loads((whole / "report.json").read_text())["cost"]["seconds"]
    rng = random.Random(arguments.seed)
    known: dict[tuple[int, int], float] = {}
    for number in range(arguments.kills):
        process = subprocess.Popen(
            [*COMMAND, "--out", str(killed)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        # One in four hits the start, the others the work; it takes several to get through the work.
        if number % 4 == 0:
            time.sleep(rng.uniform(0.1, 3))
        else:
            wait_until_it_works(killed, process)
            time.sleep(rng.uniform(0, work / 8))
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
