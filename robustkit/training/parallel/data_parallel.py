"""Training with several processes: each has a part of every batch, or each has some of the members.

Both give the gradients of a single process. With member parallelism they are equal bit for bit: each member
sees the whole batch, so no sum changes its order; images that members make for each other are broadcast.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from robustkit.core.errors import UsageError, did_you_mean
from robustkit.training.checkpoint import ModelState, TrainState
from robustkit.training.method import Method, Plan, ProcessGroup

if TYPE_CHECKING:
    from lightning_fabric import Fabric

DATA, MEMBERS = "data", "members"
CHOICES = (DATA, MEMBERS)
# With member parallelism: steps between two broadcasts of the first process's clock, each of which waits for
# devices.
CLOCK_SYNC_STEPS = 16


def check(name: str, processes: int, method: Method, plan: Plan) -> None:
    """Check that a kind of parallelism fits the number of processes, the plan and the method.

    Raises:
        UsageError: if it does not, or there is no such kind.
    """
    if name not in CHOICES:
        raise did_you_mean("parallel", name, CHOICES)
    if name == DATA:
        if plan.batch_size % processes:
            raise UsageError(
                f"--batch-size {plan.batch_size} is not a multiple of the {processes} processes; use a multiple."
            )
    elif processes > plan.members:
        raise UsageError(
            f"--parallel members: {processes} processes are more than --members {plan.members}; start at most "
            f"{plan.members}, or use --parallel data."
        )
    elif processes > 1 and not method.supports_member_parallel():
        raise UsageError(f"--parallel members: {method.info.name} has one loss over all members; use data.")


def members_of(members: int, rank: int, processes: int) -> range:
    """Return the members of a process: a contiguous range; the sizes of two ranges differ by at most one."""
    return range(members * rank // processes, members * (rank + 1) // processes)


@dataclass(frozen=True, kw_only=True)
class DataParallel(ProcessGroup):
    """Data parallelism: this process has a part of every batch, and all members.

    Args:
        fabric: Lightning Fabric of the processes.
        members: number of members of the run.
    """

    fabric: Fabric
    members: int

    @classmethod
    def of(cls, name: str, fabric: Fabric, members: int) -> DataParallel:
        """Return this process's group, of the kind that `--parallel` names."""
        rank, size = fabric.global_rank, fabric.world_size
        if name == MEMBERS and size > 1:
            return MemberParallel(first=members_of(members, rank, size).start, fabric=fabric, members=members)
        return cls(part=rank, parts=size, fabric=fabric, members=members)

    @property
    def own_members(self) -> range:
        """Indices of the members that this process trains."""
        return range(self.members)

    def mean(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the means over all processes, with one all-reduce."""
        if self.parts == 1:
            return ProcessGroup.mean(self, tensors)
        flat = torch.cat([tensor.detach().reshape(-1) for tensor in tensors])
        found: Tensor = self.fabric.all_reduce(flat, reduce_op="mean")
        parts = torch.split(found, [tensor.numel() for tensor in tensors])
        return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]

    def all_reduce(self, nets: Sequence[nn.Module], loss: Tensor) -> Tensor:
        """Average gradients and running statistics over the processes, in place; return the average loss."""
        if self.parts == 1:
            return loss
        tensors = [
            tensor
            for net in nets
            for tensor in (
                *(parameter.grad for parameter in net.parameters() if parameter.grad is not None),
                *(buffer for buffer in net.buffers() if buffer.is_floating_point()),
            )
        ]
        mean, *parts = self.mean([loss, *tensors])
        with torch.no_grad():
            for tensor, part in zip(tensors, parts, strict=True):
                tensor.copy_(part)
        return mean

    def gather_memory(self, rows: Tensor, signs: Tensor) -> tuple[Tensor, Tensor]:
        """Return the rows (B) of all images of a step and their signs (B members C H W)."""
        if self.parts == 1:
            return rows, signs
        every = [self.fabric.all_gather(one) for one in (rows, signs)]
        return every[0].flatten(0, 1), every[1].flatten(0, 1)

    def agree(self, due: bool, place: int) -> bool:
        """Return whether all processes write a checkpoint at this place of the epoch."""
        return due

    def synchronise(self, train_state: TrainState, model_state: ModelState) -> None:
        """Copy the current state of all members to every process."""


@dataclass(frozen=True, kw_only=True)
class MemberParallel(DataParallel):
    """Member parallelism: this process has some of the members, and every whole batch."""

    @property
    def own_members(self) -> range:
        """Indices of the members that this process trains."""
        return members_of(self.members, self.fabric.global_rank, self.fabric.world_size)

    def exchanged(self, made: Sequence[Tensor]) -> list[Tensor]:
        """Return the tensors of all members; each is broadcast by its process."""
        found = []
        for member, rank in enumerate(owner_ranks(self.members, self.fabric.world_size)):
            is_own = rank == self.fabric.global_rank
            sent = made[member - self.first].contiguous() if is_own else torch.empty_like(made[0]).contiguous()
            torch.distributed.broadcast(sent, rank)
            # The memory format of the sender is kept, since it determines the order of sums.
            found.append(made[member - self.first] if is_own else torch.empty_like(made[0]).copy_(sent))
        return found

    def all_reduce(self, nets: Sequence[nn.Module], loss: Tensor) -> Tensor:
        """Return the mean of all members' losses, given the mean of this process's members."""
        found: Tensor = self.fabric.all_reduce(loss * (len(self.own_members) / self.members), reduce_op="sum")
        return found

    def gather_memory(self, rows: Tensor, signs: Tensor) -> tuple[Tensor, Tensor]:
        """Return the rows (B), and the signs (B members C H W) of every member from its process."""
        return rows, torch.stack(self.exchanged([signs[:, member] for member in self.own_members]), 1)

    def agree(self, due: bool, place: int) -> bool:
        """Return whether a checkpoint is due in the first process, every few steps; False at other steps."""
        return place % CLOCK_SYNC_STEPS == 0 and self.fabric.broadcast(due)

    def synchronise(self, train_state: TrainState, model_state: ModelState) -> None:
        """Broadcast each member's net, optimizer and average; add the passes counted since the last call."""
        counts = [
            train_state.pass_counts.forwards - train_state.shared_counts[0],
            train_state.pass_counts.backwards - train_state.shared_counts[1],
        ]
        for rank in range(self.fabric.world_size):
            body = None
            if rank == self.fabric.global_rank:
                stream = io.BytesIO()
                torch.save([counts, [model_state.member_state(member) for member in self.own_members]], stream)
                body = stream.getvalue()
            body = self.fabric.broadcast(body, rank)
            if rank != self.fabric.global_rank and body is not None:
                device = train_state.loss.device
                other_counts, states = torch.load(io.BytesIO(body), map_location=device, weights_only=True)
                for member, state in zip(
                    members_of(self.members, rank, self.fabric.world_size), states, strict=True
                ):
                    model_state.load_member(member, state)
                train_state.pass_counts.forwards += other_counts[0]
                train_state.pass_counts.backwards += other_counts[1]
        train_state.shared_counts = train_state.pass_counts.forwards, train_state.pass_counts.backwards


def owner_ranks(members: int, processes: int) -> list[int]:
    """Return the rank of each member's process."""
    return [rank for rank in range(processes) for _ in members_of(members, rank, processes)]
