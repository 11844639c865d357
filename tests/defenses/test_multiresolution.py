"""The multi-resolution stack and its random numbers: properties B-P12 to B-P17."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from robustkit.core.errors import UsageError
from robustkit.core.rng import RowRng
from robustkit.defenses.multiresolution.stack import PRESETS, MultiResolution, grey_blend, halves, rolled
from robustkit.models.randomness import Noise, content

PLAIN = MultiResolution((32, 16, 8, 4), noise_small=0, noise_large=0, jitter=0, contrast=(1, 1), colour=(1, 1))
USUAL = MultiResolution.preset("notebook", 32)


def images(count: int = 4, *shape: int) -> Tensor:
    return torch.rand(count, *(shape or (3, 32, 32)), generator=torch.Generator().manual_seed(0))


def rng(count: int = 4, seed: int = 0) -> RowRng:
    return RowRng(seed, "test", torch.arange(count))


def test_shape_and_box() -> None:
    """B-P12, for images of any shape; the constants are those published."""
    for shape, height in (((3, 32, 32), 32), ((1, 8, 8), 8), ((3, 7, 9), 7)):
        x = images(4, *shape)
        stack = MultiResolution.preset("paper", height)
        out = stack(x, rng())
        assert out.shape == (4, len(stack.resolutions) * shape[0], *shape[1:])
        assert (out >= 0).all()
        assert (out <= 1).all()
    assert USUAL == MultiResolution((32, 16, 8, 4), 0.2, 0.2, 3, None, (0.5, 1.0))
    assert MultiResolution.preset("paper", 32) == replace(USUAL, contrast=(0.7, 1.5))
    assert (halves(224), halves(8), halves(2)) == ((224, 112, 56, 28), (8, 4), (2,))


def test_a_constant_stays_where_nothing_is_drawn() -> None:
    """B-P12; and one full resolution is the identity."""
    out = PLAIN(torch.full((2, 3, 32, 32), 0.3), rng(2))
    assert torch.allclose(out, torch.full_like(out, 0.3), atol=1e-6)
    x = images()
    assert torch.equal(replace(PLAIN, resolutions=(32,))(x, rng()), x)


def test_without_colour_the_channels_are_equal() -> None:
    """B-P13."""
    out = replace(PLAIN, colour=(0, 0))(images(), rng()).view(4, 4, 3, 32, 32)
    assert torch.allclose(out, out[:, :, :1].expand_as(out), atol=1e-6)


def test_jitter_moves_pixels_around() -> None:
    """B-P14: at most three of them, each image by its own draw."""
    x = images(64)
    out = replace(PLAIN, resolutions=(32,), jitter=3)(x, rng(64))
    assert torch.equal(out.flatten(1).sort(1).values, x.flatten(1).sort(1).values)
    moves = {(i, j): x.roll((i, j), (2, 3)) for i in range(-3, 4) for j in range(-3, 4)}
    found = [next(move for move, to in moves.items() if torch.equal(to[row], out[row])) for row in range(64)]
    assert len(set(found)) > 25
    assert {i for i, _ in found} == set(range(-3, 4))
    assert torch.equal(rolled(x[:1], torch.tensor([2]), torch.tensor([-5])), x[:1].roll((2, -5), (2, 3)))


def test_the_mean_and_variance_of_noise() -> None:
    """B-P15."""
    stack = replace(PLAIN, resolutions=(32, 8), noise_small=0.2, noise_large=0.1)
    out = stack(torch.full((64, 3, 32, 32), 0.3), rng(64))
    assert float(out.mean()) == pytest.approx(0.3 + 0.1 + 0.05, abs=1e-3)
    last = replace(PLAIN, resolutions=(32,), noise_large=0.2)(torch.full((64, 3, 32, 32), 0.3), rng(64))
    assert float(last.var()) == pytest.approx(0.2**2 / 12, rel=0.02)


def test_contrast_is_torchvisions() -> None:
    functional = pytest.importorskip("torchvision.transforms.functional")
    x = images()
    for factor in (0.5, 1.0, 1.4):
        expected = functional.adjust_contrast(x, factor)
        assert torch.allclose(grey_blend(x, torch.full((4,), factor)), expected, atol=1e-6)


def test_the_notebooks_contrast_uses_the_draw_of_the_colour() -> None:
    """Channels at one brightness: only where both draws are one is the deviation their product, a square."""
    stack = replace(PLAIN, resolutions=(32,), contrast=None, colour=(0.5, 1.0))
    x = torch.full((200, 3, 32, 32), 0.5)
    x[:, 0] = 0.6
    out = stack(x, rng(200))
    shares = (out[:, 0] - out[:, 1]).mean((1, 2)) / 0.1
    factors = torch.linspace(0.5, 1, 100).square()
    assert float((shares[:, None] - factors).abs().min(1).values.max()) < 1e-5
    assert len({round(float(share), 4) for share in shares}) > 70
    free = replace(stack, contrast=(0.7, 1.5))(x, rng(200))
    other = (free[:, 0] - free[:, 1]).mean((1, 2)) / 0.1
    assert float((other[:, None] - factors).abs().min(1).values.max()) > 1e-3


def test_resolutions_and_images_have_draws_of_their_own() -> None:
    out = replace(USUAL, resolutions=(32, 32))(images(1).expand(3, -1, -1, -1), rng(3)).view(3, 2, -1)
    assert all(not torch.equal(one, two) for one, two in [(out[0, 0], out[0, 1]), (out[0], out[1])])


def test_policies() -> None:
    """B-P16; torch's generator repeats fresh numbers, and content follows an image wherever it is."""
    x = images(6)

    def out(policy: str, stack_input: Tensor = x) -> Tensor:
        return USUAL(stack_input, Noise.parse(policy).rng(stack_input))

    assert not torch.equal(out("fresh"), out("fresh"))
    torch.manual_seed(5)
    one = out("fresh")
    torch.manual_seed(5)
    assert torch.equal(out("fresh"), one)
    for policy in ("frozen", "frozen:3", "content", "content:9"):
        whole = out(policy)
        assert torch.equal(whole, out(policy))
        assert torch.equal(whole, torch.cat([out(policy, x[:2]), out(policy, x[2:5]), out(policy, x[5:])]))
        assert torch.equal(whole.flip(0), out(policy, x.flip(0)))
    assert not torch.equal(out("frozen"), out("frozen:3"))
    assert not torch.equal(out("content"), out("content:9"))
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    out("frozen")
    out("content")
    assert torch.equal(before, torch.random.get_rng_state())
    same = Noise.parse("fresh").rng(x, torch.Generator().manual_seed(2)).seed
    assert Noise.parse("fresh").rng(x, torch.Generator().manual_seed(2)).seed == same
    assert torch.equal(before, torch.random.get_rng_state())


def test_noise_free_draws_are_means() -> None:
    """No jitter, factors and noise halfway."""
    x = images(2)
    calm = USUAL(x, Noise("calm").rng(x))
    still = replace(USUAL, jitter=0, colour=(50 / 198 + 0.5, 50 / 198 + 0.5), noise_small=0, noise_large=0)
    still = replace(still, resolutions=(32,))
    assert torch.allclose(calm[:, :3], (still(x, rng(2)) + 0.2).clamp(0, 1), atol=1e-5)


def test_content_is_a_hash() -> None:
    """One bit of one pixel, or two pixels exchanged, give another number; the sign of zero does not."""
    x = images(1).expand(201, -1, -1, -1).clone()
    for row in range(1, 101):
        x[row, 0, row % 32, row // 32] = x[row, 0, row % 32, row // 32].nextafter(torch.tensor(2.0))
        x[100 + row, 1, 0, [row % 31, 31]] = x[0, 1, 0, [31, row % 31]]
    found = content(x)
    assert len(set(found[:101].tolist())) == 101
    assert len(set(found.tolist())) == 1 + 100 + 31
    zero = torch.zeros(1, 3, 4, 4)
    assert torch.equal(content(zero), content(-zero))
    spread = content(torch.rand(4000, 1, 2, 2, generator=torch.Generator().manual_seed(0))).double() / 2**32
    assert float(spread.mean()) == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("policy", ["Frozen", "fresh:1", "calm:1", "frozen:x", ""])
def test_an_unknown_policy_is_refused(policy: str) -> None:
    with pytest.raises(UsageError, match="noise"):
        Noise.parse(policy)


def test_a_policy_is_written_as_it_is_read() -> None:
    for text in ("fresh", "frozen", "frozen:7", "content", "content:2", "calm"):
        assert str(Noise.parse(text)) == text


def test_the_gradient_is_that_of_differences() -> None:
    """B-P17, inside the clip."""
    stack = replace(USUAL, resolutions=(8, 4), noise_small=0.05, noise_large=0.05)
    x = (0.4 + 0.1 * images(1, 3, 8, 8).double()).requires_grad_()
    draws = Noise("frozen", 1).rng(x)
    assert torch.autograd.gradcheck(lambda image: stack(image, draws), (x,), atol=1e-6)


def test_the_coarse_view_reads_a_quarter_of_the_pixels() -> None:
    """B-P17 and B.1: rows 2-5, 10-13, 18-21, 26-29 and the same columns; the finer views read all."""
    read = {}
    for height in (16, 8, 4):
        x = torch.full((1, 3, 32, 32), 0.5, requires_grad=True)
        weight = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
        (weight * replace(PLAIN, resolutions=(height,))(x, rng(1))).sum().backward()
        assert x.grad is not None
        read[height] = x.grad[0].abs().sum(0) > 0
    assert read[16].all()
    assert read[8].all()
    rows = torch.tensor([2 <= row % 8 <= 5 for row in range(32)])
    assert torch.equal(read[4], rows[:, None] & rows)
    assert float(read[4].float().mean()) == 0.25
    kernel = F.interpolate(torch.eye(32)[None, :, :, None].expand(-1, -1, -1, 1), (4, 1), mode="bicubic")
    assert kernel[0, 2:6, 0, 0].tolist() == pytest.approx([-0.09375, 0.59375, 0.59375, -0.09375], abs=1e-6)


@pytest.mark.parametrize(
    "wrong",
    [{"resolutions": ()}, {"resolutions": (0,)}, {"noise_small": -1}, {"jitter": -1}, {"colour": (1.0, 0.5)}],
)
def test_impossible_constants_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        replace(USUAL, **wrong)


def test_presets_have_names() -> None:
    assert set(PRESETS) == {"notebook", "paper"}
    with pytest.raises(UsageError, match="no preset 'papers'"):
        MultiResolution.preset("papers", 32)
