"""The environment of a run: versions, device, commit, precision. None of it is part of the run's identity."""

from __future__ import annotations

import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from robustkit.core.devices import ComputeDevice
from robustkit.runs.invocation import command
from robustkit.version import __version__

PACKAGES = ("torch", "torchvision", "pyautoattack", "foolbox", "timm", "numpy")


def environment(
    device: torch.device, precision: str, piece: int | None, threads: int | None = None
) -> dict[str, Any]:
    """Return versions, device name, threads, git commit or None, precision, images at once and the command."""
    name = ComputeDevice(device).name or platform.processor()
    return {
        "versions": versions(),
        "device": str(device),
        "device_name": name or platform.machine(),
        "threads": threads or torch.get_num_threads(),
        "platform": platform.platform(),
        "commit": _commit(),
        "precision": precision,
        "images_at_once": piece,
        **({"command": words} if (words := command()) else {}),
    }


def versions() -> dict[str, str | None]:
    """Return the versions of Python, robustkit and its dependencies; None for a package that is not installed."""
    return {
        "python": platform.python_version(),
        "robustkit": __version__,
        **{name: _version(name) for name in PACKAGES},
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    words = ["git", "-C", str(root), "rev-parse", "HEAD"]
    try:
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
