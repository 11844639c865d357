"""Who owns which member, what is handed round in which order, and parts of a batch that act as the whole.

Processes are threads here, which exchange by a table; `test_several.py` has real ones.
"""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustkit.core.errors import UsageError
from robustkit.core.rng import RowRng
from robustkit.registry import make_method
from robustkit.training.checkpoint import ModelState, TrainState
from robustkit.training.method import Batch, Plan, ProcessGroup
from robustkit.training.parallel import data_parallel
from robustkit.training.parallel.data_parallel import DataParallel
from robustkit.training.whole_batches import WholeBatchMode

PLAN = Plan(samples=64, classes=4, batch_size=12, epochs=4, lr=0.05, members=3)


class World:
    """Processes that are threads: every exchange waits for all."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.barrier = threading.Barrier(size, timeout=30)
        self.table: list[Any] = [None] * size
        self.local = threading.local()

    def run(self, work: Callable[[Any], Any]) -> list[Any]:
        found: list[Any] = [None] * self.size

        def one(rank: int) -> None:
            self.local.rank = rank
            try:
                found[rank] = work(Fake(self, rank))
            except BaseException as error:
                found[rank] = error
                self.barrier.abort()

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for one_found in found:
            if isinstance(one_found, BaseException):
                raise one_found
        return found

    def gathered(self, value: Any) -> list[Any]:
        self.table[self.local.rank] = value
        self.barrier.wait()
        found = list(self.table)
        self.barrier.wait()
        return found

    def all_reduce(self, tensor: Tensor) -> None:
        tensor.copy_(torch.stack(self.gathered(tensor.clone())).sum(0))

    def broadcast(self, tensor: Tensor, source: int) -> None:
        tensor.copy_(self.gathered(tensor.clone())[source])


class Fake:
    """As much of Fabric as a share asks for."""

    def __init__(self, world: World, rank: int) -> None:
        self.world, self.global_rank, self.world_size = world, rank, world.size

    def all_reduce(self, tensor: Tensor, reduce_op: str) -> Tensor:
        found = torch.stack(self.world.gathered(tensor)).sum(0)
        return found / self.world_size if reduce_op == "mean" else found

    def all_gather(self, tensor: Tensor) -> Tensor:
        return torch.stack(self.world.gathered(tensor))

    def broadcast(self, body: Any, source: int = 0) -> Any:
        return self.world.gathered(body)[source]


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    two = World(2)
    fresh()
    monkeypatch.setattr(torch.distributed, "all_reduce", two.all_reduce)
    monkeypatch.setattr(torch.distributed, "broadcast", two.broadcast)
    return two


class Net(nn.Module):
    """A small net with batch norm; `Whole` is what `Member` puts around its passes."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.part, self.parts = 0, 1
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.body = nn.Sequential(
                *(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.Linear(140, 4))
            )
        self.double().train()

    def forward(self, x: Tensor) -> Tensor:
        if self.parts == 1:
            return self.body(x)
        with WholeBatchMode(self.part, self.parts, len(x)):
            return self.body(x)


@functools.cache
def fresh() -> list[Net]:
    """Return nets that nobody trains; threads would take each other's random numbers if they drew any."""
    return [Net(seed) for seed in range(3)]


def nets(count: int = 3) -> list[Net]:
    return copy.deepcopy(fresh()[:count])


def batch(process_group: ProcessGroup | None = None) -> Batch:
    """Return the part of a batch for a process group."""
    process_group = process_group or ProcessGroup()
    draw = torch.Generator().manual_seed(1)
    x, t = torch.rand(2, 12, 3, 5, 7, generator=draw, dtype=torch.float64)
    y, u, ids = torch.arange(12) % 4, torch.arange(12) % 3, torch.arange(12)
    x, t, y, u, ids = (one[process_group.part :: process_group.parts] for one in (x, t, y, u, ids))
    memory = (ids[:, None, None, None, None] % 3 - 1).to(torch.int8).expand(-1, 3, 3, 5, 7).clone()
    return Batch(x, y, RowRng(0, "method", ids, step=40), 40, t, u, memory, process_group)


def gradients(members: list[Net]) -> list[Tensor]:
    return [weight.grad for net in members for weight in net.parameters() if weight.grad is not None]


@pytest.mark.parametrize(("members", "processes"), [(2, 2), (3, 2), (5, 3), (8, 8), (7, 1)])
def test_every_member_belongs_to_one_process(members: int, processes: int) -> None:
    own = [data_parallel.members_of(members, rank, processes) for rank in range(processes)]
    assert [member for one in own for member in one] == list(range(members))
    assert max(map(len, own)) - min(map(len, own)) <= 1
    assert [rank for rank, one in enumerate(own) for _ in one] == data_parallel.owner_ranks(members, processes)


@pytest.mark.parametrize(
    ("name", "processes", "method", "sentence"),
    [
        ("member", 2, "dverge", "no parallel 'member'. Did you mean 'members'"),
        ("data", 5, "dverge", "--batch-size 12 is not a multiple of the 5 processes"),
        ("members", 4, "dverge", "4 processes are more than --members 3"),
        ("members", 2, "adp", "adp has one loss over all members"),
        ("members", 2, "pgd-at", "pgd-at has one loss"),
    ],
)
def test_invalid_parallelism_is_refused(name: str, processes: int, method: str, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        data_parallel.check(name, processes, make_method(method), PLAN)


def test_methods_that_support_member_parallelism() -> None:
    for name in ("dverge", "dverge+at", "fasten", "standard", "deep-ensemble", "multires"):
        data_parallel.check("members", 2, make_method(name), PLAN)
    data_parallel.check("members", 2, make_method("pgd-at", joint=False), PLAN)


def test_images_are_exchanged_in_the_order_of_members(world: World) -> None:
    def work(fabric: Any) -> list[Tensor]:
        group = DataParallel.of("members", fabric, 5)
        made = [torch.full((2, 3, 4, 4), float(member)) for member in group.own_members]
        return group.exchanged([one.contiguous(memory_format=torch.channels_last) for one in made])

    for found in world.run(work):
        assert [float(one.mean()) for one in found] == [0, 1, 2, 3, 4]
        assert all(one.is_contiguous(memory_format=torch.channels_last) for one in found)


@pytest.mark.parametrize(
    "method",
    [
        make_method("dverge+at", baseline=0.0, steps=2, adversarial_steps=2, random_start=True, draw="member"),
        make_method("fasten", baseline=0.0, draw="member"),
        make_method("pgd-at", joint=False, steps=2),
    ],
)
def test_member_parallelism_equals_one_process(world: World, method: Any) -> None:
    """To the bit, what is remembered too."""
    together, one = nets(), batch()
    loss = method.backward(together, one, PLAN)

    def work(fabric: Any) -> tuple[Tensor, list[Tensor], Tensor]:
        group = DataParallel.of("members", fabric, 3)
        own, part = [nets()[member] for member in group.own_members], batch(group)
        assert len(part.x) == 12
        local = group.all_reduce(own, method.backward(own, part, PLAN))
        assert part.memory is not None
        return local, gradients(own), group.gather_memory(part.rng.ids, part.memory)[1]

    found = world.run(work)
    for local, _, memory in found:
        torch.testing.assert_close(local, loss)
        assert one.memory is not None
        assert torch.equal(memory, one.memory)
    moved = [gradient for _, own, _ in found for gradient in own]
    assert all(torch.equal(a, b) for a, b in zip(moved, gradients(together), strict=True))


@pytest.mark.parametrize(
    "method",
    [
        make_method("standard"),
        make_method("dverge", baseline=0.0, steps=2, distinct=True, clean=1.0, statistics="separate"),
        make_method("adp"),
        make_method("gal"),
        make_method("trs", steps=2),
        make_method("pgd-at", steps=2),
        make_method("mba", collect_epochs=4),
    ],
)
def test_parts_of_a_batch_give_the_update_of_the_whole_batch(world: World, method: Any) -> None:
    """Batch norms, halves of the batch, pairs left out, second derivatives, and sums that are no means."""
    count = 3 if method.ensembles else 1
    alone, plan = nets(count), replace(PLAN, members=count)
    loss = method.backward(alone, batch(), plan)

    def work(fabric: Any) -> tuple[Tensor, list[Net]]:
        group, own = DataParallel.of("data", fabric, count), nets(count)
        for net in own:
            net.part, net.parts = group.part, group.parts
        return group.all_reduce(own, method.backward(own, batch(group), plan)), own

    for local, own in world.run(work):
        torch.testing.assert_close(local, loss)
        for a, b in zip(gradients(own), gradients(alone), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)
        for net, other in zip(own, alone, strict=True):
            for (name, a), (_, b) in zip(net.named_buffers(), other.named_buffers(), strict=True):
                torch.testing.assert_close(a, b, msg=name)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_random_draws_depend_on_the_position_in_the_batch(layout: torch.memory_format) -> None:
    x = torch.rand(6, 3, 4, 5).contiguous(memory_format=layout)
    draws: list[Callable[[Tensor], Tensor]] = [
        lambda tensor: F.dropout(tensor, 0.5, True),
        lambda tensor: F.dropout2d(tensor, 0.5, True),
        lambda tensor: F.alpha_dropout(tensor, 0.5, True),
        lambda tensor: tensor * tensor.new_empty(len(tensor), 1, 1, 1).bernoulli_(0.5),
    ]
    with torch.random.fork_rng(devices=[]):
        for draw in draws:
            torch.manual_seed(3)
            whole = draw(x)
            for part in range(2):
                torch.manual_seed(3)
                with WholeBatchMode(part, 2, 3):
                    assert torch.equal(draw(x[part::2].contiguous(memory_format=layout)), whole[part::2])


def test_members_are_synchronised(world: World) -> None:
    """Weights, momentum and averages of all, and what both counted, each once."""

    def work(fabric: Any) -> tuple[list[Tensor], list[Any], Tensor, int]:
        group, own = DataParallel.of("members", fabric, 3), nets()
        optimizers = [torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9) for net in own]
        averages = [copy.deepcopy(net.state_dict()) for net in own]
        state = TrainState(loss=torch.zeros(()))
        state.pass_counts.forwards, state.shared_counts = 100, (100, 0)
        parts = ModelState(own, optimizers, averages)
        for member in group.own_members:
            own[member](batch().x).sum().backward()
            optimizers[member].step()
            averages[member]["body.0.bias"].fill_(member)
            state.pass_counts.forwards += 7
        group.synchronise(state, parts)
        momentum = [next(iter(one.state.values()))["momentum_buffer"] for one in optimizers]
        weights = [net.body[0].weight.detach() for net in own]
        return (
            weights,
            momentum,
            torch.stack([one["body.0.bias"][0] for one in averages]),
            state.pass_counts.forwards,
        )

    (weights, momentum, averages, forwards), other = world.run(work)
    assert all(torch.equal(a, b) for a, b in zip(weights, other[0], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(momentum, other[1], strict=True))
    assert averages.tolist() == other[2].tolist() == [0, 1, 2]
    assert forwards == other[3] == 121
    assert not torch.equal(weights[0], fresh()[0].get_parameter("body.0.weight"))
