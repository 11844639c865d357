"""Devices, precision and processes, which Lightning Fabric provides.

Nets are not wrapped by Fabric: methods run passes that the hooks of data-parallel wrappers do not survive (attacks
in the loop, several nets, several backward passes a step). Gradients are averaged in one exchange a step.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.multiprocessing.spawn import ProcessRaisedException

from robustkit.errors import RobustkitError, RunError, UsageError

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
    """Return which of the processes that torchrun started this is; 0 without torchrun."""
    return int(os.environ.get("RANK", 0))


def count(devices: int) -> int:
    """Return how many processes a run on so many devices has: under torchrun those that it started."""
    return int(os.environ.get("WORLD_SIZE", 0)) or devices


def launch(device: torch.device, devices: int, precision: str, work: Callable[[Fabric], None]) -> None:
    """Run `work(fabric)` in every process; it must pickle, and be no dataclass, which Fabric would take apart.

    Under torchrun these are the processes there are, on all its hosts; else `devices` new ones, or this one.

    Raises:
        UsageError: if there are not so many devices.
        RunError: if a process fails.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from lightning_fabric import Fabric
    world, local = int(os.environ.get("WORLD_SIZE", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 0))
    if device.type == "cuda" and devices > torch.cuda.device_count():
        raise UsageError(f"--devices {devices}: this machine has {torch.cuda.device_count()} CUDA devices.")
    placed: int | list[int] = devices
    if world > 1:
        strategy, placed, nodes = "ddp", local or devices, world // max(local, 1)
    else:
        strategy, nodes = ("ddp_spawn" if devices > 1 else "auto"), 1
        if devices == 1 and device.index is not None:
            placed = [device.index]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fabric = Fabric(
            accelerator=device.type,
            devices=placed,
            num_nodes=nodes,
            strategy=strategy,
            precision=PRECISIONS[precision],
        )
        try:
            fabric.launch(_begin, work, torch.get_num_threads())
        except ProcessRaisedException as error:
            raise _reason(error) from error


def _begin(fabric: Fabric, work: Callable[[Fabric], None], threads: int) -> None:
    if fabric.world_size > 1:
        torch.set_num_threads(max(threads // fabric.world_size, 1))
    work(fabric)


def _reason(error: Exception) -> RobustkitError:
    """Return what a process said last."""
    last = str(error).strip().rpartition("\n")[2]
    kind, _, said = last.partition(": ")
    return RunError(said if kind.endswith(("RunError", "UsageError")) else f"a process failed: {last}.")


def synchronised(net: nn.Module, fabric: Fabric) -> nn.Module:
    """Return the net with batch norm over all processes' images on CUDA; elsewhere each process has its own."""
    if fabric.world_size > 1 and fabric.device.type == "cuda":
        converted: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(net)  # type: ignore[no-untyped-call]
        return converted
    return net


def average(nets: Sequence[nn.Module], loss: Tensor, fabric: Fabric) -> Tensor:
    """Average gradients and running statistics over the processes, in place, and the loss; all in one exchange."""
    if fabric.world_size == 1:
        return loss
    tensors: list[Tensor] = [
        tensor
        for net in nets
        for tensor in (
            *(parameter.grad for parameter in net.parameters() if parameter.grad is not None),
            *(buffer for buffer in net.buffers() if buffer.is_floating_point()),
        )
    ]
    flat = torch.cat([loss.reshape(1), *(tensor.reshape(-1) for tensor in tensors)])
    found: Tensor = fabric.all_reduce(flat, reduce_op="mean")
    mean, *parts = torch.split(found, [1, *(tensor.numel() for tensor in tensors)])
    with torch.no_grad():
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part.view(tensor.shape))
    return mean[0]


def gathered(rows: Tensor, fabric: Fabric) -> Tensor:
    """Return the rows of all processes, in their order."""
    if fabric.world_size == 1:
        return rows
    found: Tensor = fabric.all_gather(rows)
    return found.flatten(0, 1)
