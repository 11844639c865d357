"""Every verb on a simulated GPU: no tensor on the wrong device, and the results of the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from simulated_gpu import simulated_gpu
from torch import nn

import robustkit

SHAPE = (3, 6, 8)
SUITES = {
    "gradient": "pgd(steps=2,restarts=2),race(steps=2),apgd-t(steps=2,targets=2),mora(steps=2)",
    "boundary and scores": "fab(steps=2),square(queries=4)",
    "autoattack": "autoattack:apgd-ce(steps=2),autoattack:square(queries=3)",
}


class Net(nn.Module):
    """A small convolutional net for any number of channels."""

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(channels)
        self.weight = nn.Parameter(torch.randn(4, channels, 3, 3, generator=generator))
        self.head = nn.Parameter(torch.randn(4, 10, generator=generator))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.conv2d(x, self.weight).relu().mean((2, 3)) @ self.head


def problem(channels: int = 3, n: int = 3) -> tuple[Net, torch.Tensor, torch.Tensor]:
    net = Net(channels)
    x = torch.rand(n, channels, *SHAPE[1:], generator=torch.Generator().manual_seed(1))
    return net, x, net(x).argmax(1)


def evaluated(device: str, suite: str, threat: str = "linf:0.02", channels: int = 3, **options: Any) -> Any:
    net, x, y = problem(channels)
    return robustkit.evaluate(net, x, y, threat, suite=suite, device=device, precision="fp32", **options)


@pytest.mark.every_norm
@pytest.mark.parametrize("suite", SUITES.values(), ids=SUITES)
@pytest.mark.parametrize("threat", ["linf:0.02", pytest.param("l2:0.2", marks=pytest.mark.slow)])
def test_evaluate_gives_the_verdicts_of_the_cpu(suite: str, threat: str) -> None:
    expected = evaluated("cpu", suite, threat, channels=1)
    with simulated_gpu():
        found = evaluated("cuda", suite, threat, channels=1)
    assert [(v.robust, v.attack, v.margin) for v in found.verdicts] == [
        (v.robust, v.attack, v.margin) for v in expected.verdicts
    ]


@pytest.mark.parametrize("attack", ["mi-fgsm(steps=2)+di+ti", "cwa(steps=2)"])
def test_craft_gives_the_images_of_the_cpu(attack: str) -> None:
    net, x, y = problem()
    expected = robustkit.craft([net], x, y, "linf:0.1", attack=attack, device="cpu")
    with simulated_gpu():
        found = robustkit.craft([Net()], x, y, "linf:0.1", attack=attack, device="cuda")
    assert np.array_equal(found.adversarial["x"], expected.adversarial["x"])


def test_train_runs(tmp_path: Path) -> None:
    with simulated_gpu():
        robustkit.train("dverge", data="digits:train", limit=40, epochs=1, out=tmp_path / "run", device="cuda")
    assert robustkit.load_model(str(tmp_path / "run")).num_classes == 10
