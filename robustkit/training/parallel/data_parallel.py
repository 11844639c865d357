"""Who does what when several processes train: each a part of every batch, or each some of the members.

Either way a step's gradients are those of one process. With members apart even the bytes are: each member sees the
whole batch, and nothing is summed in another order; images that members make for each other are handed round.
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
# With members apart, processes hear the first one's clock so many steps apart: hearing it waits for the device.
LISTEN = 16


def check(name: str, processes: int, method: Method, plan: Plan) -> None:
    """Refuse a way to share a run among so many processes that is none, or not the method's.

    Raises:
        UsageError: if so.
    """
    if name not in CHOICES:
        raise did_you_mean("parallel", name, CHOICES)
    if name == DATA:
        if plan.batch_size % processes:
            raise UsageError(
                f"--batch-size {plan.batch_size} does not divide among {processes} processes; write a multiple."
            )
    elif processes > plan.members:
        raise UsageError(
            f"--parallel members: {processes} processes are more than --members {plan.members}; start as many, or "
            "write --parallel data."
        )
    elif processes > 1 and not method.supports_member_parallel():
        raise UsageError(f"--parallel members: {method.info.name} has one sum over all members; write data.")


def owned(members: int, rank: int, processes: int) -> range:
    """Return the members of a process: neighbours, and as many as another has or one more."""
    return range(members * rank // processes, members * (rank + 1) // processes)


@dataclass(frozen=True, kw_only=True)
class DataParallel(ProcessGroup):
    """What a process does of a run, and how it comes by the rest. This one has a part of every batch.

    Attributes:
        fabric: of the processes.
        members: of the run.
    """

    fabric: Fabric
    members: int

    @classmethod
    def of(cls, name: str, fabric: Fabric, members: int) -> DataParallel:
        """Return this process's share, of the kind that `--parallel` names."""
        rank, size = fabric.global_rank, fabric.world_size
        if name == MEMBERS and size > 1:
            return MemberParallel(first=owned(members, rank, size).start, fabric=fabric, members=members)
        return cls(part=rank, parts=size, fabric=fabric, members=members)

    @property
    def own(self) -> range:
        """The members that this process trains."""
        return range(self.members)

    def mean(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the means over all processes, in one exchange."""
        if self.parts == 1:
            return ProcessGroup.mean(self, tensors)
        flat = torch.cat([tensor.detach().reshape(-1) for tensor in tensors])
        found: Tensor = self.fabric.all_reduce(flat, reduce_op="mean")
        parts = torch.split(found, [tensor.numel() for tensor in tensors])
        return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]

    def settle(self, nets: Sequence[nn.Module], loss: Tensor) -> Tensor:
        """Make gradients and running statistics those of the whole batch, in place; return the run's loss."""
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

    def remembered(self, rows: Tensor, signs: Tensor) -> tuple[Tensor, Tensor]:
        """Return all images of a step and what is to be remembered of them (B members ...)."""
        if self.parts == 1:
            return rows, signs
        every = [self.fabric.all_gather(one) for one in (rows, signs)]
        return every[0].flatten(0, 1), every[1].flatten(0, 1)

    def agreed(self, due: bool, place: int) -> bool:
        """Return whether all processes are to do what is due by this one's clock."""
        return due

    def collect(self, course: TrainState, parts: ModelState) -> None:
        """Bring all members, as they are now, into every process."""


@dataclass(frozen=True, kw_only=True)
class MemberParallel(DataParallel):
    """Some of the members, with every batch whole."""

    @property
    def own(self) -> range:
        """The members that this process trains."""
        return owned(self.members, self.fabric.global_rank, self.fabric.world_size)

    def exchanged(self, made: Sequence[Tensor]) -> list[Tensor]:
        """Return what every member made: each in turn is sent by its process."""
        found = []
        for member, rank in enumerate(owners(self.members, self.fabric.world_size)):
            mine = rank == self.fabric.global_rank
            sent = made[member - self.first].contiguous() if mine else torch.empty_like(made[0]).contiguous()
            torch.distributed.broadcast(sent, rank)
            # Memory is laid out as at the maker's, or sums would come out in another order.
            found.append(made[member - self.first] if mine else torch.empty_like(made[0]).copy_(sent))
        return found

    def settle(self, nets: Sequence[nn.Module], loss: Tensor) -> Tensor:
        """Return the mean of all members' losses, given that of one's own."""
        found: Tensor = self.fabric.all_reduce(loss * (len(self.own) / self.members), reduce_op="sum")
        return found

    def remembered(self, rows: Tensor, signs: Tensor) -> tuple[Tensor, Tensor]:
        """Return the images, and of every member what its process has of it."""
        return rows, torch.stack(self.exchanged([signs[:, member] for member in self.own]), 1)

    def agreed(self, due: bool, place: int) -> bool:
        """Return what the first process says, at places where it is asked."""
        return place % LISTEN == 0 and self.fabric.broadcast(due)

    def collect(self, course: TrainState, parts: ModelState) -> None:
        """Send each member's net, optimiser and average to all; add up what was counted since the last time."""
        counts = [course.tally.forwards - course.counted[0], course.tally.backwards - course.counted[1]]
        for rank in range(self.fabric.world_size):
            body = None
            if rank == self.fabric.global_rank:
                stream = io.BytesIO()
                torch.save([counts, [parts.state(member) for member in self.own]], stream)
                body = stream.getvalue()
            body = self.fabric.broadcast(body, rank)
            if rank != self.fabric.global_rank and body is not None:
                place = course.loss.device
                theirs, states = torch.load(io.BytesIO(body), map_location=place, weights_only=True)
                for member, state in zip(owned(self.members, rank, self.fabric.world_size), states, strict=True):
                    parts.take(member, state)
                course.tally.forwards += theirs[0]
                course.tally.backwards += theirs[1]
        course.counted = course.tally.forwards, course.tally.backwards


def owners(members: int, processes: int) -> list[int]:
    """Return the process of each member."""
    return [rank for rank in range(processes) for _ in owned(members, rank, processes)]
