"""Faults of code for a GPU are found on the simulated one, with their line."""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from simulated_gpu import GPU, simulated_gpu
from torch import Tensor, nn

import robustkit
from robustkit.attacks.gradient.pgd import PGD
from robustkit.training.method import Method

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts/tools"))

import test_step_ceilings
from step_costs import step_costs


def reads_a_number(x: Tensor) -> None:
    x.amax().item()


def branches_on_a_tensor(x: Tensor) -> None:
    assert x.amax() <= 1


def indexes_with_a_mask(x: Tensor) -> None:
    x[x[:, 0, 0, 0] > 2]


def uploads_a_list(x: Tensor) -> None:
    torch.tensor([1.0], device=x.device)


def downloads(x: Tensor) -> None:
    x.cpu()


def copies_in_float64(x: Tensor) -> None:
    x.double()


def line(fault: Callable[..., object]) -> str:
    """Return the line of a fault, as the harness writes it."""
    return f"tests/gpu/test_planted_faults.py:{inspect.getsourcelines(fault)[1] + 1}"


def plant(fault: Callable[[Tensor], None], owner: type, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a method commit a fault first, on the images of the argument that has them."""
    method = getattr(owner, name)

    def faulty(*arguments: Any) -> Any:
        fault(next(argument.x for argument in arguments if hasattr(argument, "x")))
        return method(*arguments)

    monkeypatch.setattr(owner, name, faulty)


@cache
def todays_costs(name: str) -> tuple[int, int]:
    """Return the launches and synchronisations of a step as a ceiling."""
    costs = step_costs(name)
    return math.ceil(costs.launches), math.ceil(costs.syncs)


STEP_FAULTS = [reads_a_number, branches_on_a_tensor, indexes_with_a_mask, uploads_a_list, copies_in_float64]


@pytest.mark.parametrize(
    ("fault", "owner", "method", "name"),
    [*((fault, PGD, "step", "pgd") for fault in STEP_FAULTS), (downloads, Method, "backward", "train standard")],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_fault_in_a_step_exceeds_the_ceiling(
    fault: Callable[[Tensor], None], owner: type, method: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(test_step_ceilings.CEILINGS, name, todays_costs(name))
    plant(fault, owner, method, monkeypatch)
    kind = "launch" if fault is copies_in_float64 else "sync"
    with pytest.raises(AssertionError, match=f"{kind} +1.00 +{line(fault)}"):
        test_step_ceilings.test_a_step_costs_at_most_its_ceiling(name)


class Mixes(nn.Linear):
    """A net that makes a tensor without naming a device."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(1) + torch.arange(4))


def test_a_tensor_on_another_device_is_an_error_with_its_line() -> None:
    x, y = torch.rand(2, 1, 2, 2), torch.tensor([0, 1])
    with (
        simulated_gpu(),
        pytest.raises(robustkit.RobustkitError, match=f"cuda:0 and cpu: .* at {line(Mixes.forward)}"),
    ):
        robustkit.evaluate(Mixes(4, 2), x, y, "linf:0.02", suite="fgsm", device="cuda")


def test_an_index_on_the_gpu_into_a_tensor_of_the_cpu_is_an_error() -> None:
    with simulated_gpu():
        index = torch.arange(2, device=GPU)
        assert torch.rand(3).to(GPU)[index].device == GPU
        with pytest.raises(RuntimeError, match="cuda:0 and cpu"):
            torch.rand(3)[index]


def test_a_copy_that_is_read_before_the_device_is_waited_for_is_wrong() -> None:
    values = torch.rand(3)
    with simulated_gpu() as gpu:
        there = values.to(GPU)
        gpu.counts.clear()
        host = there.to("cpu", non_blocking=True)
        assert host.isnan().all()
        assert gpu.total("sync") == 0
        torch.cuda.synchronize()
        assert host.equal(values)
        assert gpu.total("sync") == 1
