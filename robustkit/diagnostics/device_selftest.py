"""A test of the device against closed-form results: whether its verdicts are right, and how fast it is."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from robustkit.core.threat import ThreatModel
from robustkit.data import from_arrays
from robustkit.engine.evaluation.run import Evaluation
from robustkit.models import as_classifier, load_model

IMAGES, SIDE, CLASSES = 96, 8, 4
DUAL = {"linf": 1.0, "l2": 2.0, "l1": torch.inf}


@dataclass(frozen=True)
class NormTrial:
    """One norm: how many images are robust by theory and by attack, and how many verdicts were false."""

    threat: str
    expected: int
    found: int
    false: int
    images: int
    seconds: float


@dataclass(frozen=True)
class Speed:
    """Forward plus input gradient of the built-in net, images per second."""

    precision: str
    images_per_second: float


def closed_form(device: torch.device) -> list[NormTrial]:
    """Return PGD's verdicts on a linear classifier, whose distance to the decision boundary is known in each norm.

    Images whose distance is within 2 % of eps are left out. The box is too far away to matter.
    """
    weight = torch.randn(CLASSES, SIDE * SIDE, generator=torch.Generator().manual_seed(0))
    x = 0.5 + 0.02 * torch.randn(IMAGES, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    moved = weight.to(device)

    def net(images: Tensor) -> Tensor:
        return (images - 0.5).flatten(1) @ moved.T

    logits = (x - 0.5).flatten(1) @ weight.T
    labels = logits.argmax(1)
    trials = []
    for norm, dual in DUAL.items():
        slopes = (weight[labels][:, None] - weight[None]).norm(p=dual, dim=2)
        gaps = logits.gather(1, labels[:, None]) - logits
        distance = (gaps / slopes.clamp(min=1e-9)).scatter(1, labels[:, None], torch.inf).amin(1)
        eps = float(distance.median()) * 1.03
        kept = (distance / eps - 1).abs() > 0.02
        robust_by_theory = distance[kept] > eps
        begun = time.perf_counter()
        plan = Evaluation(
            as_classifier(net),
            from_arrays(x[kept], labels[kept]),
            ThreatModel.parse(f"{norm}:{eps:.6f}"),
            suite="pgd(steps=100,step_size=0.05,restarts=8,loss=margin,density=0)",
            device=device,
        )
        robust = torch.tensor([verdict.robust for verdict in plan.run().verdicts])
        trials.append(
            NormTrial(
                str(plan.threat),
                int(robust_by_theory.sum()),
                int(robust.sum()),
                int((robust != robust_by_theory).sum()),
                int(kept.sum()),
                time.perf_counter() - begun,
            )
        )
    return trials


def speeds(device: torch.device) -> list[Speed]:
    """Return the built-in net's rates in float32 and bfloat16, over about a second each."""
    net = load_model("robustkit:digits-cnn", device=device).requires_grad_(False)
    x = torch.rand(256, 1, SIDE, SIDE, device=device)

    def images_per_second(dtype: torch.dtype | None) -> float:
        rounds, begun = 0, time.perf_counter()
        while time.perf_counter() - begun < 0.5:
            point = x.clone().requires_grad_()
            with torch.autocast(device.type, dtype, enabled=dtype is not None):
                logits = net(point)
            torch.autograd.grad(logits.float().sum(), point)[0].sum().item()
            rounds += 1
        return rounds * len(x) / (time.perf_counter() - begun)

    return [Speed(name, images_per_second(dtype)) for name, dtype in (("fp32", None), ("bf16", torch.bfloat16))]
