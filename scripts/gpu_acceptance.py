"""Check robustkit on a GPU in one run of at most eight minutes, and write acceptance.json and acceptance.html.

    python scripts/gpu_acceptance.py [--models FOLDER --data FILE.npz] [--out gpu-acceptance] [--quick]

Sections, each with a time budget: the tests marked `gpu`; pyautoattack (float32, version standard) against the
suites `autoattack` and `rapid` on a WRN-28-10 with random weights, and on the nets of --models; verdicts of the
GPU and of the CPU; host synchronisations of a step; memory against the forecast of `measure`; time of `craft` and
`train` over that of the bare passes. A section that fails, or runs out of time, is recorded with its error and the
rows that it had, and the others run. Needs the checkout, its dependencies, torch, torchvision and timm.

Ends with exit code 1 if a section failed. --quick takes tiny sizes: it checks the script, not the GPU.
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent / "tools"))

from gpu_acceptance_page import page
from gpu_acceptance_sections import SECTIONS
from gpu_acceptance_setup import FULL, QUICK, Row, Setup

from robustkit.core.devices import pick_device
from robustkit.runs.environment import environment


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Raise TimeoutError inside after this time, where the system has timers."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"out of time after {seconds} s")

    if not hasattr(signal, "SIGALRM"):
        yield
        return
    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def run_section(name: str, setup: Setup) -> Row:
    """Return the record of a section: its rows, seconds, and the error that ended it or None."""
    section, budget = SECTIONS[name]
    rows, error, begun = list[Row](), None, time.perf_counter()
    try:
        with time_limit(budget):
            for row in section(setup):
                rows.append(row)
                print(f"{name}: {row}", file=sys.stderr)
    except Exception as failure:
        where = traceback.extract_tb(failure.__traceback__)[-1]
        error = f"{type(failure).__name__}: {failure} ({Path(where.filename).name}:{where.lineno})"
        print(f"{name}: {error}", file=sys.stderr)
    about = (section.__doc__ or "").strip()
    seconds = time.perf_counter() - begun
    return {"name": name, "about": about, "seconds": seconds, "budget": budget, "error": error, "rows": rows}


def found_nets(folder: Path | None) -> dict[str, str]:
    """Return model strings by name: run folders, and weights of CIFAR ResNets such as resnet20-at.safetensors."""
    nets = {}
    for path in sorted(folder.iterdir()) if folder else ():
        depth = re.match(r"resnet(20|32|44|56)\b", path.name)
        if (path / "model.json").exists():
            nets[path.name] = f"{path}/"
        elif depth and path.suffix == ".safetensors":
            nets[path.stem] = f"robustkit:cifar-resnet{depth[1]}@{path}"
    return nets


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the sections, write both files and return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", type=Path, help="a folder of run folders or weights of CIFAR ResNets")
    parser.add_argument("--data", help="a data string or .npz of the images that these nets are compared on")
    parser.add_argument("--out", type=Path, default=Path("gpu-acceptance"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", default=",".join(SECTIONS), help="names of sections, separated by commas")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to check the script")
    given = parser.parse_args(arguments)
    names = given.only.split(",")
    if unknown := set(names) - set(SECTIONS):
        parser.error(f"no section {', '.join(sorted(unknown))}; sections are {', '.join(SECTIONS)}")
    sizes = QUICK if given.quick else FULL
    setup = Setup(pick_device(given.device), sizes, found_nets(given.models), given.data)
    sections = list[Row]()
    record = {
        "format": 1,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "quick": given.quick,
        "environment": environment(setup.device, "fp32", None),
        "sections": sections,
    }
    given.out.mkdir(parents=True, exist_ok=True)
    for name in names:
        sections.append(run_section(name, setup))
        # After every section, so that a run that is ended from outside leaves those before.
        (given.out / "acceptance.json").write_text(json.dumps(record, indent=2) + "\n")
        (given.out / "acceptance.html").write_text(page(record), encoding="utf-8")
    print(given.out / "acceptance.html")
    return int(any(section["error"] for section in sections))


if __name__ == "__main__":
    sys.exit(main())
