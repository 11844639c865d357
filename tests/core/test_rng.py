"""The counter-based generator: published vectors, independence of the batch, distribution."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from scipy import stats

from robustkit.core.rng import RowRng, philox

ONES = 0xFFFFFFFF


# Random123's kat_vectors for philox4x32-10.
@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([ONES] * 4, [ONES] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_known_answers(counter, key, expected):
    words = philox([torch.tensor([word]) for word in counter], list(key))
    assert [word.item() for word in words] == expected


DRAWS = {
    "uniform": lambda rng: rng.uniform(3, 7, 9),
    "normal": lambda rng: rng.normal(3, 7, 9),
    "integers": lambda rng: rng.integers(2**31, 3, 7, 9),
}


@pytest.mark.parametrize("kind", DRAWS)
def test_random_draws_of_a_row_are_independent_of_the_batch(kind):
    ids = torch.tensor([5, 0, 2**33 + 5, 77, 1])
    rng = RowRng(3, "pgd", ids)
    whole = DRAWS[kind](rng)
    assert whole.shape == (5, 3, 7, 9)
    for order in itertools.islice(itertools.permutations(range(5)), 0, 120, 13):
        index = torch.tensor(order)
        assert torch.equal(DRAWS[kind](rng.select(index)), whole[index])
    for i in range(5):
        assert torch.equal(DRAWS[kind](RowRng(3, "pgd", ids[i : i + 1])), whole[i : i + 1])
    assert torch.equal(DRAWS[kind](rng.select(ids > 4)), whole[ids > 4])


def test_seed_stream_sample_restart_and_step_change_the_draws():
    # Each pair differs in one part; 2**32 apart ids and restarts once met in the same counter word.
    sets: list[dict[str, Any]] = [
        dict(seed=seed, stream=stream, ids=torch.tensor([number]), restart=restart, step=step)
        for seed in (0, 1, -1, 2**63)
        for stream in ("pgd", "pgd/0", "")
        for number in (0, 1, 2**32, 2**32 + 1, 2**33, 3 * 2**32)
        for restart in (0, 1, 2, 3)
        for step in (0, 1, 5)
    ]
    seen = {tuple(RowRng(**one).integers(2**31, 4).flatten().tolist()) for one in sets}
    assert len(seen) == len(sets)


def test_at_changes_restart_and_step():
    rng = RowRng(0, "a", torch.arange(2))
    assert (rng.at(restart=2).at(step=3).restart, rng.at(restart=2).at(step=3).step) == (2, 3)
    assert torch.equal(rng.at(step=1).at(step=0).uniform(4), rng.uniform(4))


def test_numbers_are_pinned():
    # A change here changes every run that was ever recorded.
    rng = RowRng(0, "pin", torch.tensor([0, 1]))
    assert rng.integers(1000, 4).tolist() == [[406, 514, 482, 134], [112, 444, 139, 725]]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_ids_of_either_width(dtype):
    ids = torch.tensor([7, 9], dtype=dtype)
    assert torch.equal(RowRng(0, "a", ids).uniform(5), RowRng(0, "a", ids.long()).uniform(5))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 189])
def test_odd_sizes(size):
    rng = RowRng(0, "odd", torch.arange(5))
    for draw in (rng.uniform(size), rng.normal(size), rng.integers(10, size)):
        assert draw.shape == (5, size)
    assert torch.equal(rng.uniform(size), rng.uniform(189)[:, :size])


def test_no_shape_is_one_number_per_row():
    rng = RowRng(0, "one", torch.arange(5))
    assert rng.uniform().shape == rng.normal().shape == rng.integers(3).shape == (5,)


@pytest.mark.parametrize("axis", ["within a row", "across rows", "across steps", "across restarts"])
def test_distribution(axis):
    size = 20000
    if axis == "within a row":
        rngs = [RowRng(1, "ks", torch.tensor([0]))]
    elif axis == "across rows":
        rngs = [RowRng(1, "ks", torch.arange(size))]
    elif axis == "across steps":
        rngs = [RowRng(1, "ks", torch.tensor([0]), step=step) for step in range(500)]
    else:
        rngs = [RowRng(1, "ks", torch.tensor([0]), restart=restart) for restart in range(500)]
    count = size if axis == "within a row" else 1
    uniform = torch.cat([rng.uniform(count).flatten() for rng in rngs])
    normal = torch.cat([rng.normal(count).flatten() for rng in rngs])
    assert uniform.min() >= 0
    assert uniform.max() < 1
    assert normal.isfinite().all()
    assert stats.kstest(uniform.numpy(), "uniform").pvalue > 1e-3
    assert stats.kstest(normal.numpy(), "norm").pvalue > 1e-3
    if axis == "within a row":
        assert abs(stats.pearsonr(normal[:-1], normal[1:]).statistic) < 0.03
        halves = normal[: size // 2], normal[size // 2 :]
        assert abs(stats.pearsonr(*halves).statistic) < 0.03


def test_integers_cover_their_range_evenly():
    draws = RowRng(0, "dice", torch.arange(100)).integers(6, 300).flatten()
    counts = torch.bincount(draws, minlength=6)
    assert len(counts) == 6
    assert stats.chisquare(counts.numpy()).pvalue > 1e-3
    assert RowRng(0, "dice", torch.arange(3)).integers(1, 4).tolist() == [[0] * 4] * 3
    assert RowRng(0, "dice", torch.arange(9)).integers(2**31, 99).min() >= 0


def test_the_global_generator_does_not_move():
    before = torch.get_rng_state()
    rng = RowRng(0, "still", torch.arange(3))
    rng.uniform(5), rng.normal(5), rng.integers(5, 5)
    assert torch.equal(torch.get_rng_state(), before)
