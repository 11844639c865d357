"""8-bit image files stay within eps after rounding, counted in whole levels."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from robustkit import ThreatModel, UsageError
from robustkit.crafting.png_export import LABELS, allowance, levels, measure, quantized, save

GREYS = np.arange(256, dtype=np.float32) / np.float32(255)


@pytest.mark.parametrize("eps", [4, 8, 16])
@pytest.mark.parametrize("share", [-1.0, -0.97, -0.5, 0.031, 0.5, 0.999, 1.0])
def test_every_grey_level_stays_within_eps(eps: int, share: float) -> None:
    threat = ThreatModel.parse(f"linf:{eps}/255")
    clean = torch.from_numpy(GREYS).view(1, 1, 16, 16)
    adversarial = threat.project(clean + share * eps / 255, clean)
    whole = quantized(adversarial.numpy(), clean.numpy(), threat).astype(int)
    change = np.abs(whole - np.arange(256).reshape(1, 1, 16, 16))
    assert change.max() <= eps
    # and no level is given away: what rounding alone keeps inside is the nearest level
    assert (np.abs(whole - 255 * adversarial.numpy().astype(np.float64)) <= 0.5 + 1e-4).all()


@pytest.mark.parametrize("eps", ["0.15", "8/255", "1/500"])
def test_files_of_images_between_levels_stay_within_eps(eps: str) -> None:
    """Digits are sixteenths: rounded, then changed by whole levels, they would end up to half a level too far."""
    threat = ThreatModel.parse(f"linf:{eps}")
    clean = (torch.arange(17) / 16).repeat(2).view(1, 1, 2, 17)
    for sign in (-1, 1):
        adversarial = threat.project(clean + sign * torch.tensor([1.0, 0.3])[:, None], clean)
        whole = quantized(adversarial.numpy(), clean.numpy(), threat).astype(np.int64)
        change = np.abs(whole - 255 * clean.numpy().astype(np.float64))
        reach = 255 * float(Fraction(eps))
        assert change.max() <= (reach + 1e-5 if reach > 0.5 else 0.5)
        assert (measure(whole - levels(clean.numpy()), "linf") <= allowance(threat)).all()


@pytest.mark.parametrize("eps", [4, 8, 16])
def test_plain_truncation_would_leave_the_ball(eps: int) -> None:
    down = np.maximum(GREYS - np.float32(eps / 255), 0)
    truncated = (np.float32(255) * down).astype(np.uint8).astype(int)
    assert np.abs(truncated - np.arange(256)).max() == eps + 1


@given(
    norm=st.sampled_from(["linf", "l2", "l1"]),
    eps=st.fractions(Fraction(1, 500), Fraction(1, 2)),
    seed=st.integers(0, 10**6),
    eight_bit=st.booleans(),
)
def test_distances_of_every_norm_are_exact_in_whole_levels(
    norm: str, eps: Fraction, seed: int, eight_bit: bool
) -> None:
    eps = eps * {"linf": 1, "l2": 4, "l1": 40}[norm]
    threat = ThreatModel.parse(f"{norm}:{min(eps, Fraction(1)) if norm == 'linf' else eps}")
    generator = torch.Generator().manual_seed(seed)
    clean = torch.rand(2, 3, 5, 7, generator=generator)
    if eight_bit:
        clean = (255 * clean).round() / 255
    adversarial = threat.project(clean + 0.6 * torch.randn(clean.shape, generator=generator), clean)
    whole = quantized(adversarial.numpy(), clean.numpy(), threat)
    change = whole.astype(np.int64) - levels(clean.numpy())
    assert (measure(change, norm) <= allowance(threat)).all()
    if eight_bit:
        # in exact fractions, from the clean image itself
        flat = [[abs(Fraction(int(value), 255)) for value in row] for row in change.reshape(2, -1)]
        total = {"linf": max, "l2": lambda row: sum(v * v for v in row), "l1": sum}[norm]
        most = Fraction(threat.eps) ** (2 if norm == "l2" else 1)
        assert all(total(row) <= most + Fraction(1, 10**8) for row in flat)


def test_an_unperturbed_image_is_exported_unchanged() -> None:
    clean = GREYS.reshape(1, 1, 16, 16)
    for threat in ("linf:0", "l2:0", "l1:0"):
        assert (quantized(clean, clean, ThreatModel.parse(threat)) == np.arange(256).reshape(1, 1, 16, 16)).all()


@pytest.mark.parametrize("channels", [1, 3])
def test_exported_files_read_back_as_the_same_images(channels: int, tmp_path: Path) -> None:
    clean = np.random.default_rng(0).integers(0, 256, (4, channels, 5, 7)).astype(np.float32) / np.float32(255)
    threat = ThreatModel.parse("linf:8/255")
    adversarial = np.clip(clean + np.float32(0.02), 0, 1)
    parts = [(adversarial[:3], clean[:3]), (adversarial[3:], clean[3:])]
    images, largest = save(tmp_path / "png", parts, [3, 1, 4, 1], threat)
    assert (levels(images[np.arange(4)]) == quantized(adversarial, clean, threat)).all()
    assert largest == 5
    assert (tmp_path / "png" / LABELS).read_text().splitlines()[:2] == ["file,index,label", "000000.png,0,3"]
    assert len(list((tmp_path / "png").glob("*.png"))) == 4
    (tmp_path / "png" / ".robustkit-0123456789abcdef.part").write_bytes(b"killed")
    save(tmp_path / "png", parts, [3, 1, 4, 1], threat)  # again, over its own files
    # A smaller run would leave images of this one among its own.
    with pytest.raises(UsageError, match=r"holds '000003.png'; give --png an empty or new folder"):
        save(tmp_path / "png", parts[:1], [3, 1, 4], threat)


def test_images_and_folders_that_cannot_be_exported_are_refused(tmp_path: Path) -> None:
    threat = ThreatModel.parse("linf:8/255")
    two = np.zeros((1, 2, 5, 7), np.float32)
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(UsageError, match=r"thesis\.tex"):
        save(tmp_path, [(two[:, :1], two[:, :1])], [0], threat)
    with pytest.raises(UsageError, match="2 channels"):
        save(tmp_path / "png", [(two, two)], [0], threat)
