"""How much memory an evaluation takes of images that are streamed from tar shards, from the first to the last.

    python scripts/tools/stream_memory.py --out scripts/results --work /tmp/stream

Writes small synthetic images into WebDataset shards (1 GB for 200,000, with the run's folder 2 GB), runs
`robustkit evaluate` on a tiny net with PGD of one step, and looks at the memory (RSS) of the process and, with
`--workers`, of its workers as the verdicts come in. Writes stream_memory.png and .txt. Linux only. The labels are
what the net says, so all images are attacked; eps is such that about half of them fall.
"""

from __future__ import annotations

import argparse
import datetime
import io
import os
import sqlite3
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from robustkit.data import load_data
from robustkit.runs.ledger import Chunk, Ledger, Verdict

SIDE, CLASSES, SHARD = 16, 10, 10_000
BATCH = 256
MIB = 1 << 20
NET = f"""import torch


def build():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear({3 * SIDE * SIDE}, {CLASSES}))
"""
Row = tuple[float, int, float, float]


def write_shards(place: Path, count: int) -> None:
    """Write shards of random images with the net's own labels, unless they are there."""
    place.mkdir(parents=True, exist_ok=True)
    code: dict[str, Any] = {}
    exec(NET, code)
    net = code["build"]()
    for number, begin in enumerate(range(0, count, SHARD)):
        shard = place / f"{number:03d}.tar"
        if shard.exists():
            continue
        size = min(SHARD, count - begin)
        pixels = np.random.RandomState(number).randint(0, 256, (size, SIDE, SIDE, 3)).astype(np.uint8)
        with torch.no_grad():
            labels = net((torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255).contiguous()).argmax(1).tolist()
        draft = shard.with_suffix(".part")
        with tarfile.open(draft, "w") as archive:
            for row, label in enumerate(labels):
                packed = io.BytesIO()
                Image.fromarray(pixels[row]).save(packed, "png", compress_level=0)
                for kind, content in (("cls", str(label).encode()), ("png", packed.getvalue())):
                    member = tarfile.TarInfo(f"{begin + row:08d}.{kind}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
        draft.rename(shard)


def rss(process: int) -> float:
    """Return the memory that a process has now, in MiB; 0 if it has ended."""
    try:
        return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / MIB
    except (OSError, IndexError):
        return 0.0


def workers(driver: int) -> list[int]:
    """Return the processes that a driver has started to work for it."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(status.read_text().rpartition(")")[2].split()[1])
            if parent == driver and b"spawn_main" in (status.parent / "cmdline").read_bytes():
                found.append(int(status.parent.name))
        except (OSError, IndexError, ValueError):
            continue
    return found


def verdicts(ledger: Path) -> int:
    """Return how many verdicts a ledger holds."""
    try:
        with closing(sqlite3.connect(f"{ledger.absolute().as_uri()}?mode=ro", uri=True)) as db:
            return int(db.execute("SELECT coalesce(max(rowid), 0) FROM verdicts").fetchone()[0])
    except sqlite3.Error:
        return 0


def watch(command: list[str], out: Path) -> Iterator[Row]:
    """Run it; yield seconds, verdicts so far, the driver's memory and the largest worker's until it ends."""
    begun = time.perf_counter()
    process = subprocess.Popen([*command, "--out", str(out)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None:
        largest = max(map(rss, workers(process.pid)), default=0.0)
        yield time.perf_counter() - begun, verdicts(out / "ledger.sqlite"), rss(process.pid), largest
        time.sleep(0.25)
    if process.returncode:
        raise SystemExit(f"exit code {process.returncode} of {' '.join(command)}")


def ledger_speed(place: Path, count: int, stored: bool) -> str:
    """Return the verdicts that a ledger on disk takes each second, in chunks; if `stored`, half with an image."""
    image = bytes(3 * SIDE * SIDE * 4) if stored else None
    place.unlink(missing_ok=True)
    with Ledger.open(place, "speed") as ledger:
        begun, busy = time.perf_counter(), time.process_time()
        for number, begin in enumerate(range(0, count, BATCH)):
            rows = [
                Verdict(
                    position,
                    position % CLASSES,
                    0,
                    0.123,
                    position % 2 == 0,
                    "0" * 64,
                    image if position % 2 == 0 else None,
                )
                for position in range(begin, min(begin + BATCH, count))
            ]
            ledger.write(Chunk(1, number, BATCH, BATCH, 1.0, rows))
        seconds, busy = time.perf_counter() - begun, time.process_time() - busy
    place.unlink()
    return f"{count / seconds:,.0f} verdicts a second ({count / busy:,.0f} a second of CPU time)"


def table(rows: list[Row], every: int) -> Iterator[str]:
    """Yield a line for each `every` verdicts: seconds, and memory when they were there."""
    wanted = 0
    for seconds, done, driver, worker in rows:
        if done >= wanted:
            yield f"{done:>10,} {seconds:>8.0f} {driver:>10.0f}" + (f" {worker:>10.0f}" if worker else "")
            wanted = done - done % every + every


def draw(rows: list[Row], count: int, place: Path) -> None:
    """Draw memory over time."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    seconds, done, driver, worker = np.array(rows).T
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    axes.plot(seconds, driver, label="driver" if worker.any() else "the process")
    if worker.any():
        axes.plot(seconds[worker > 0], worker[worker > 0], label="its largest worker")
    whole = count * 3 * SIDE * SIDE * 4 / MIB
    axes.axhline(whole, ls=":", color="grey", label=f"the images as one array, {whole:.0f} MiB")
    axes.set(xlabel="seconds", ylabel="memory (RSS), MiB", ylim=(0, 1.15 * max(whole, driver.max(), worker.max())))
    twin = axes.twinx()
    twin.plot(seconds, done, color="tab:green", ls="--", label="verdicts")
    twin.set(ylabel="verdicts in the ledger", ylim=(0, None))
    lines = [*axes.get_lines(), *twin.get_lines()]
    axes.legend(lines, [str(line.get_label()) for line in lines], loc="center right")
    axes.set_title(f"{count:,} images streamed from tar shards, clean pass and PGD of one step")
    figure.savefig(place, dpi=120)


def main() -> None:
    """Do it and write it down."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=200_000)
    parser.add_argument("--limit", type=int, help="evaluate so many of them only")
    parser.add_argument("--workers", type=int)
    parser.add_argument("--work", type=Path, required=True, help="folder for shards, index and run")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    arguments = parser.parse_args()
    count = arguments.limit or arguments.images
    shards = arguments.work / "shards"
    write_shards(shards, arguments.images)
    (arguments.work / "net.py").write_text(NET)
    begun = time.perf_counter()
    samples = load_data(f"webdataset:{shards}", root=arguments.work)
    indexed = time.perf_counter() - begun
    name = f"run-{count}" + (f"-{arguments.workers}" if arguments.workers else "")
    run = arguments.work / f"{name}-{time.time_ns()}"
    command = [sys.executable, "-m", "robustkit", "evaluate", f"{arguments.work / 'net.py'}:build"]
    command += ["--data", f"webdataset:{shards}", "--data-root", str(arguments.work), "--limit", str(count)]
    command += [
        "--threat",
        "linf:0.002",
        "--suite",
        "pgd(steps=1,step_size=1)",
        "--precision",
        "fp32",
        "--device",
        "cpu",
    ]
    command += ["--workers", str(arguments.workers)] if arguments.workers else []
    rows = list(watch(command, run))
    place = arguments.out / "stream_memory"
    draw(rows, count, place.with_suffix(".png"))
    bare, full = (
        ledger_speed(arguments.work / "speed.sqlite", min(count, 50_000), stored) for stored in (False, True)
    )
    clean, low = (next(row[2] for row in rows if row[1] >= share * count) for share in (0.1, 1.1))
    last, end = next(row[2] for row in reversed(rows) if row[1] < 2 * count), max(row[2] for row in rows)
    text = [
        f"$ python {' '.join(sys.argv)}   ({datetime.date.today()}, {os.cpu_count()} cores)",
        f"index of {len(samples):,} images: {indexed:.1f} s; the run: {rows[-1][0]:.0f} s",
        f"ledger on disk: {bare}",
        f"  where every other has its image: {full}",
        f"memory: {clean:.0f} MiB after a tenth of the clean pass, {low:.0f} after a tenth of the attack",
        f"  {last:.0f} at its last verdict, at most {end:.0f} before the end (report, page, table)",
        f"  from a tenth of the attack on {(last - low) * MIB / (0.9 * count):.0f} bytes for each further image, "
        f"and {(end - last) * MIB / count:.0f} for each image at the end",
        "",
        "  verdicts  seconds driver MiB" + (" worker MiB" if arguments.workers else ""),
        *table(rows, 20_000),
    ]
    place.with_suffix(".txt").write_text("\n".join(text) + "\n")
    print("\n".join(text))


if __name__ == "__main__":
    main()
