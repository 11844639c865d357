"""List the sockets that listen while an evaluation with workers runs: what a port scan of the machine would find.

    python scripts/tools/listening_sockets.py -- --workers 2
    python scripts/tools/listening_sockets.py -- --ray local --workers 2

Runs `robustkit evaluate` with what follows `--` and looks every 0.2 s at the driver and all processes below it,
TCP and Unix sockets (Linux). It fails if the driver or a worker that is not a process of Ray listens.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

COMMAND = [sys.executable, "-m", "robustkit", "evaluate", "--limit", "48", "--suite", "pgd(steps=40)", "--no-html"]
# States of a listening socket in /proc/net: of TCP, and the flag of a Unix socket.
TCP_LISTEN, UNIX_LISTEN = "0A", "00010000"
SECONDS = 0.2


def below(parent: int) -> dict[int, str]:
    """Return a process and all its descendants, with their command lines."""
    parents, commands = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            commands[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
        except (OSError, IndexError, ValueError):
            continue
    found = {parent}
    while more := {pid for pid, above in parents.items() if above in found} - found:
        found |= more
    return {pid: commands.get(pid, "") for pid in found}


def listening() -> dict[str, str]:
    """Return the address of each listening socket of this machine, by inode."""
    found = {}
    for name in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == TCP_LISTEN:
                found[fields[9]] = f"{name} port {int(fields[1].rpartition(':')[2], 16)}"
    for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[3] == UNIX_LISTEN:
            found[fields[6]] = f"unix {fields[7] if len(fields) > 7 else '(no name)'}"
    return found


def inodes(pid: int) -> Iterator[str]:
    """Yield the inodes of the sockets that a process has open."""
    try:
        for link in os.scandir(f"/proc/{pid}/fd"):
            target = os.readlink(link.path)
            if target.startswith("socket:["):
                yield target[8:-1]
    except OSError:
        return


def kind(pid: int, command: str, driver: int, with_ray: bool) -> str:
    """Return what a process is."""
    if pid == driver:
        return "driver (with Ray's library)" if with_ray else "driver"
    if "ray::" in command or "/ray/" in command or "ray-" in command:
        return "Ray's " + (command.split()[0] if command.startswith("ray::") else "cluster")
    return "worker" if "spawn_main" in command else f"other ({command[:40]})"


def main() -> int:
    """Return 1 if a process of ours listens."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*", help="more words for robustkit evaluate, after --")
    words = parser.parse_args().words
    with tempfile.TemporaryDirectory() as folder:
        return scan(words, Path(folder))


def scan(words: list[str], folder: Path) -> int:
    """Print the sockets during one evaluation; return 1 if a process of ours listens."""
    command = [*COMMAND, "--out", str(folder / "run"), *words]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    with_ray = "--ray" in words
    seen: dict[str, set[str]] = defaultdict(set)
    counts: dict[str, set[int]] = defaultdict(set)
    while process.poll() is None:
        sockets = listening()
        for pid, line in below(process.pid).items():
            name = kind(pid, line, process.pid, with_ray)
            counts[name].add(pid)
            seen[name] |= {sockets[inode] for inode in inodes(pid) if inode in sockets}
        time.sleep(SECONDS)
    for name, pids in sorted(counts.items()):
        found = sorted(seen[name])
        print(f"{name}, {len(pids)} processes: {len(found)} listening sockets", *found[:8], sep="\n    ")
    print(f"exit code {process.returncode}")
    ours = [name for name in seen if "Ray" not in name and seen[name]]
    return 1 if ours or process.returncode else 0


if __name__ == "__main__":
    sys.exit(main())
