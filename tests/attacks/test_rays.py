"""RayS: against the authors' loop written plainly, and on planes, whose nearest boundary is known."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from robustkit.attack_api.driver import run_attempts
from robustkit.attacks.score.rays import LARGEST, RayS
from robustkit.core.criteria import Goal
from robustkit.core.rng import RowRng
from robustkit.core.threat import ThreatModel

SHAPE = (2, 3, 4)
Model = Callable[[torch.Tensor], torch.Tensor]


def plane(seed: int, margin: float) -> tuple[Model, torch.Tensor, float]:
    """Return a classifier with a plane as its boundary, an image, and the boundary's linf distance."""
    w = torch.from_numpy(np.random.default_rng(seed).standard_normal(SHAPE)).float()
    x = torch.full((1, *SHAPE), 0.5)

    def model(images: torch.Tensor) -> torch.Tensor:
        score = ((images - 0.5) * w).flatten(1).sum(1) - margin
        return torch.stack([-score, score], 1)

    return model, x, margin / float(w.abs().sum())


def radius_by_the_authors_loop(model: Model, x: torch.Tensor, queries: int, tolerance: float) -> float:
    """Return the radius after so many queries, image by image, as in the paper's algorithm."""
    left = queries

    def fooled(sign: np.ndarray, radius: float) -> bool:
        nonlocal left
        left -= 1
        if left < 0:
            raise StopIteration
        point = (x + torch.from_numpy(sign).float().view_as(x) * radius).clamp(0, 1)
        return int(model(point).argmax()) != 0

    best, sign = LARGEST, np.ones(x.numel())

    def search(trial: np.ndarray) -> None:
        nonlocal best, sign
        if not fooled(trial, best):
            return
        sign, low, high = trial, 0.0, best
        while high - low > tolerance:
            middle = (low + high) / 2
            low, high = (low, middle) if fooled(trial, middle) else (middle, high)
            best = high

    try:
        search(sign.copy())
        while True:
            for level in range((x.numel() - 1).bit_length() + 1):
                size = -(-x.numel() // 2**level)
                for begin in range(0, x.numel(), size):
                    trial = sign.copy()
                    trial[begin : begin + size] *= -1
                    search(trial)
    except StopIteration:
        return best


@pytest.mark.parametrize("queries", [1, 7, 40, 133, 400])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_radius_is_that_of_the_authors_loop(queries: int, seed: int) -> None:
    model, x, _ = plane(seed, 3.0)
    attack, threat = RayS(queries=queries), ThreatModel.parse("linf:0.02")
    goal, rng = Goal(torch.zeros(1, dtype=torch.int64)), RowRng(0, "rays", torch.zeros(1, dtype=torch.int64))
    seen: list[float] = []

    class Watched(RayS):
        def step(self, rows, state, answer):
            state = super().step(rows, state, answer)
            seen.append(float(state["radius"]))
            return state

    run_attempts(Watched(queries=queries), model, x, goal, threat, rng, None)
    assert attack.steps == queries - 1
    # The state after the last query is not computed.
    expected = radius_by_the_authors_loop(model, x, queries - 1, attack.tolerance)
    assert (seen[-1] if seen else LARGEST) == pytest.approx(expected)


@pytest.mark.parametrize("seed", [2, 3, 4])
def test_on_a_plane_it_reaches_the_nearest_boundary(seed: int) -> None:
    model, x, distance = plane(seed, 0.5)
    goal, rng = Goal(torch.zeros(1, dtype=torch.int64)), RowRng(0, "rays", torch.zeros(1, dtype=torch.int64))
    for factor, found in ((1.05, True), (0.99, False)):
        threat = ThreatModel.parse(f"linf:{factor * distance}")
        adversarial = run_attempts(RayS(queries=2000), model, x, goal, threat, rng, None)
        assert bool((model(adversarial).argmax(1) == 1).all()) == found
        assert float((adversarial - x).abs().max()) <= factor * distance + 1e-6
