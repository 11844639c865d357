"""HopSkipJump on planes, whose nearest boundary is known, and its estimate of a normal."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from robustkit.attack_api.driver import run_attempts
from robustkit.attacks.score.hop_skip_jump import HopSkipJump, _normal
from robustkit.core.criteria import Goal
from robustkit.core.rng import RowRng
from robustkit.core.threat import ThreatModel
from robustkit.registry import find

SHAPE = (2, 3, 4)


@pytest.mark.parametrize("seed", [0, 1])
def test_on_a_plane_it_comes_near_the_boundary(seed: int) -> None:
    w = torch.from_numpy(np.random.default_rng(seed).standard_normal(SHAPE)).float()
    distance = 0.3
    x = torch.full((5, *SHAPE), 0.5)

    def model(images: torch.Tensor) -> torch.Tensor:
        score = ((images - 0.5) * w).flatten(1).sum(1) / w.norm() - distance
        return torch.stack([-score, score], 1)

    goal = Goal(torch.zeros(5, dtype=torch.int64))
    rng = RowRng(0, "hop-skip-jump", torch.arange(5))
    for factor, least, most in ((1.25, 5, 5), (0.99, 0, 0)):
        threat = ThreatModel.parse(f"l2:{factor * distance}")
        adversarial = run_attempts(HopSkipJump(queries=1200), model, x, goal, threat, rng, None)
        assert least <= int((model(adversarial).argmax(1) == 1).sum()) <= most
        assert float((adversarial - x).flatten(1).norm(dim=1).max()) <= factor * distance + 1e-5


def test_the_normal_is_the_authors_estimate() -> None:
    numbers = torch.Generator().manual_seed(0)
    offsets = torch.randn(3, 40, *SHAPE, generator=numbers)
    signs = torch.where(torch.rand(3, 40, generator=numbers, dtype=torch.float64) < 0.7, 1.0, -1.0).double()
    signs[1] = -1.0
    weighted = signs.view(3, 40, 1, 1, 1).float() * offsets
    state = {
        "drawn": torch.full((3,), 40),
        "signs": signs.sum(1),
        "plain": offsets.sum(1),
        "signed": weighted.sum(1),
    }
    for row, found in enumerate(_normal(state)):
        mean = float(signs[row].mean())
        centred = signs[row] - (0.0 if abs(mean) == 1 else mean)
        expected = (centred.view(40, 1, 1, 1) * offsets[row].double()).mean(0)
        torch.testing.assert_close(found.double(), expected / expected.norm(), atol=1e-5, rtol=1e-5)


def test_a_suite_by_labels_exists_where_an_attack_does() -> None:
    assert find("suite", "blackbox-labels")("l2") == ["hop-skip-jump(queries=10000)"]
    assert find("suite", "blackbox-labels")("linf") == ["rays(queries=10000)"]
    with pytest.raises(ValueError, match="no attack by labels in l1"):
        find("suite", "blackbox-labels")("l1")
