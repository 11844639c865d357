"""Devices, precision and processes, by Lightning Fabric.

Fabric does not wrap the nets: the hooks of data-parallel wrappers do not support what methods do (attacks in the
loop, several nets, several backward passes per step). See `robustkit.training.parallel.data_parallel`.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch.multiprocessing.spawn import ProcessRaisedException

from robustkit.core.devices import ComputeDevice
from robustkit.core.errors import RobustkitError, RunError, UsageError
from robustkit.training.parallel.hosts import find_launcher

if TYPE_CHECKING:
    from lightning_fabric import Fabric

PRECISIONS = {"fp32": "32-true", "bf16": "bf16-mixed"}


def pick_precision(precision: str, device: torch.device) -> str:
    """Return fp32 or bf16; `auto` is bf16 on a GPU that supports it."""
    if precision == "auto":
        return "bf16" if ComputeDevice(device).has_fast_bf16 else "fp32"
    if precision not in PRECISIONS:
        raise UsageError(f"precision {precision!r}: training runs in auto, fp32 or bf16.")
    return precision


def rank() -> int:
    """Return the rank of this process among those of a launcher; 0 without a launcher."""
    found = find_launcher(os.environ)
    return 0 if found is None else found.rank


def is_single_process() -> bool:
    """Return whether this process was started without a launcher of several."""
    return find_launcher(os.environ) is None


def count_processes(device: torch.device, devices: int) -> int:
    """Return the number of processes of a run: those of the launcher, or one new process for each device.

    Args:
        device: where to train.
        devices: devices to use on each host.

    Raises:
        UsageError: if there are fewer devices, or the launcher started another number of processes.
    """
    if devices < 1:
        raise UsageError(f"--devices must be at least 1, got {devices}.")
    found = find_launcher(os.environ)
    here = devices if found is None else found.per_host
    if found is not None and devices not in (1, here):
        raise UsageError(
            f"--devices {devices}: {found.name} started {here} processes on this host, one for each device; leave "
            "it out."
        )
    if here > 1 and device.index is not None:
        raise UsageError(f"--device {device} is one for {here} processes; write --device {device.type}.")
    visible = ComputeDevice(device).count
    if here > visible and not ComputeDevice(device).is_cpu:
        cause = f"--devices {devices}" if found is None else f"{found.name} started {here} processes on this host"
        raise UsageError(f"{cause}: this process sees {visible} {device.type} devices.")
    return devices if found is None else found.size


def launch(device: torch.device, devices: int, precision: str, work: Callable[[Fabric], str]) -> str:
    """Call `work(fabric)` in every process and return its result in this one.

    With a launcher these are its processes, on all hosts; else `devices` new processes, or this process for one.

    Args:
        device: where to train.
        devices: devices to use on this host.
        precision: fp32 or bf16.
        work: a picklable function. It must not be a dataclass: Fabric would unpack it.

    Raises:
        RunError: if a process fails.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from lightning_fabric import Fabric
        from lightning_fabric.plugins.environments import LightningEnvironment, TorchElasticEnvironment

        found = find_launcher(os.environ)
        placed: int | list[int] = devices
        if found is not None:
            os.environ.update(found.variables)
            strategy, placed, nodes = "ddp", found.per_host, found.nodes
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
            # A launcher assigns cores to each process; new processes share the cores of this one.
            threads = torch.get_num_threads() // (devices if found is None else 1)
            result: str = fabric.launch(_run, work, max(threads, 1))
        except ProcessRaisedException as error:
            raise _reason(error) from error
    return result


def _run(fabric: Fabric, work: Callable[[Fabric], str], threads: int) -> str:
    torch.set_num_threads(threads)
    result = work(fabric)
    if fabric.world_size > 1:
        # At interpreter exit, gloo threads that still hold tensors would abort the finished process.
        fabric.barrier()
        torch.distributed.destroy_process_group()
    return result


def _reason(error: Exception) -> RobustkitError:
    """Return the error of a process, from the last line of its traceback."""
    last = str(error).strip().rpartition("\n")[2]
    kind, _, message = last.partition(": ")
    return RunError(message if kind.endswith(("RunError", "UsageError")) else f"a process failed: {last}.")
