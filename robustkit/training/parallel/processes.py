"""Devices, precision and processes, which Lightning Fabric provides.

Nets are not wrapped by Fabric: methods run passes that the hooks of data-parallel wrappers do not survive (attacks
in the loop, several nets, several backward passes a step). What they exchange is
`robustkit.training.parallel.data_parallel`.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch.multiprocessing.spawn import ProcessRaisedException

from robustkit.core.errors import RobustkitError, RunError, UsageError
from robustkit.training.parallel.hosts import launched

if TYPE_CHECKING:
    from lightning_fabric import Fabric

PRECISIONS = {"fp32": "32-true", "bf16": "bf16-mixed"}


def pick_precision(precision: str, device: torch.device) -> str:
    """Return fp32 or bf16; `auto` is bf16 on a CUDA device that has it."""
    if precision == "auto":
        return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"
    if precision not in PRECISIONS:
        raise UsageError(f"precision {precision!r}: training runs in auto, fp32 or bf16.")
    return precision


def rank() -> int:
    """Return which of the processes that a launcher started this is; 0 without one."""
    found = launched(os.environ)
    return 0 if found is None else found.rank


def alone() -> bool:
    """Return whether no launcher started this process beside others."""
    return launched(os.environ) is None


def count(device: torch.device, devices: int) -> int:
    """Return how many processes a run on so many devices of each host has: a launcher's, or as many new ones.

    Raises:
        UsageError: if there are not so many devices, or the launcher started another number of processes.
    """
    if devices < 1:
        raise UsageError(f"--devices {devices} must be 1 or more.")
    found = launched(os.environ)
    here = devices if found is None else found.local
    if found is not None and devices not in (1, here):
        raise UsageError(
            f"--devices {devices}: {found.by} started {here} processes on this host, one for each device; leave "
            "it out."
        )
    if here > 1 and device.index is not None:
        raise UsageError(f"--device {device} is one for {here} processes; write --device {device.type}.")
    there = torch.cuda.device_count() if device.type == "cuda" else 1
    if here > there and device.type != "cpu":
        by = f"--devices {devices}" if found is None else f"{found.by} started {here} processes on this host"
        raise UsageError(f"{by}: it has {there} {device.type} devices that this process sees.")
    return devices if found is None else found.size


def launch(device: torch.device, devices: int, precision: str, work: Callable[[Fabric], str]) -> str:
    """Return what `work(fabric)` does, in every process.

    It must pickle, and be no dataclass, which Fabric would take apart.

    Under a launcher these are the processes there are, on all its hosts; else `devices` new ones, or this one.

    Raises:
        RunError: if a process fails.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from lightning_fabric import Fabric
        from lightning_fabric.plugins.environments import LightningEnvironment, TorchElasticEnvironment

        found = launched(os.environ)
        placed: int | list[int] = devices
        if found is not None:
            os.environ.update(found.told)
            strategy, placed, nodes = "ddp", found.local, found.nodes
        else:
            strategy, nodes = ("ddp_spawn" if devices > 1 else "auto"), 1
            if devices == 1 and device.index is not None:
                placed = [device.index]
        fabric = Fabric(
            accelerator=device.type,
            devices=placed,
            num_nodes=nodes,
            strategy=strategy,
            precision=PRECISIONS[precision],
            plugins=LightningEnvironment() if found is None else TorchElasticEnvironment(),
        )
        try:
            # A launcher has given each process its cores; new ones share this one's.
            threads = torch.get_num_threads() // (devices if found is None else 1)
            said: str = fabric.launch(_begin, work, max(threads, 1))
        except ProcessRaisedException as error:
            raise _reason(error) from error
    return said


def _begin(fabric: Fabric, work: Callable[[Fabric], str], threads: int) -> str:
    torch.set_num_threads(threads)
    said = work(fabric)
    if fabric.world_size > 1:
        # Left to the end of the interpreter, threads of gloo that still hold tensors abort a process that is done.
        fabric.barrier()
        torch.distributed.destroy_process_group()
    return said


def _reason(error: Exception) -> RobustkitError:
    """Return what a process said last."""
    last = str(error).strip().rpartition("\n")[2]
    kind, _, said = last.partition(": ")
    return RunError(said if kind.endswith(("RunError", "UsageError")) else f"a process failed: {last}.")
