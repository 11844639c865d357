"""T-DEE against values that follow from its definition."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "reproductions"))

from deep_ensemble_equivalent import Equivalent, deep_ensemble_equivalent


def hits(share: float, n: int = 200) -> list[bool | None]:
    return [place < share * n for place in range(n)]


NETS = {1: hits(0.4), 2: hits(0.6), 5: hits(0.9)}


@pytest.mark.parametrize(
    ("share", "value"),
    [(0, 0), (0.2, 0.5), (0.4, 1), (0.5, 1.5), (0.6, 2), (0.75, 3.5), (0.9, 5), (0.95, math.inf)],
)
def test_t_dee_lies_between_the_measured_counts(share: float, value: float) -> None:
    found = deep_ensemble_equivalent(NETS, hits(share))
    assert found.value == pytest.approx(value)
    assert found.low <= found.value <= found.high


def test_images_that_the_target_gets_wrong_do_not_count() -> None:
    def padded(row: list[bool | None]) -> list[bool | None]:
        return [*row, *[None] * 100]

    wide = deep_ensemble_equivalent({count: padded(row) for count, row in NETS.items()}, padded(hits(0.5)))
    assert wide == deep_ensemble_equivalent(NETS, hits(0.5))
    with pytest.raises(ValueError, match="same images"):
        deep_ensemble_equivalent({1: [None]}, [None])
    with pytest.raises(ValueError, match="same images"):
        deep_ensemble_equivalent(NETS, hits(0.5, 100))


def test_more_nets_that_do_worse_are_noise() -> None:
    found = deep_ensemble_equivalent({1: hits(0.5), 2: hits(0.4), 3: hits(0.7)}, hits(0.5))
    assert found.value == 1
    assert deep_ensemble_equivalent({1: hits(0.5), 2: hits(0.4), 3: hits(0.7)}, hits(0.6)).value == 2.5


def test_t_dee_is_printed_as_text() -> None:
    assert str(Equivalent(4.24, 3.5, math.inf, 5)) == "4.2 (3.5 – >5)"


def test_the_interval_covers_the_true_value() -> None:
    """Over samples of images from a population of known success, 95 % intervals hold the truth about as often."""
    rng = np.random.default_rng(0)
    truth = {1: 0.3, 2: 0.5, 4: 0.8}
    inside = 0
    for _ in range(60):
        hard = rng.random(150)
        nets = {count: (hard < share).tolist() for count, share in truth.items()}
        found = deep_ensemble_equivalent(nets, (rng.random(150) < 0.65).tolist())
        inside += found.low <= 3 <= found.high
    assert inside >= 52
