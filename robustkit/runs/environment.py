"""The environment of a run: versions, device, commit, precision. None of it is part of the run's identity."""

from __future__ import annotations

import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from robustkit.core.devices import ComputeDevice
from robustkit.core.float32 import float32_settings
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
        **({"kernels": _kernels(device)} if not ComputeDevice(device).is_cpu else {}),
        **({"command": words} if (words := command()) else {}),
    }


def _kernels(device: torch.device) -> dict[str, Any]:
    """Return the settings that decide how an accelerator computes, as they are now."""
    deterministic = {"deterministic": torch.are_deterministic_algorithms_enabled()}
    if device.type != "cuda":
        return deterministic
    cudnn = torch.backends.cudnn
    settings = {"deterministic_convolutions": cudnn.deterministic, "benchmark": cudnn.benchmark}
    version = cudnn.version()  # type: ignore[no-untyped-call]
    return {"float32": float32_settings(), "cudnn": version, **deterministic, **settings}


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
