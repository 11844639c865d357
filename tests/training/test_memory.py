"""Signs packed four to a byte, which follow their pixels through crops and flips."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from robustkit.core.errors import UsageError
from robustkit.data import from_arrays
from robustkit.registry import make_method
from robustkit.training import train as training
from robustkit.training.augment import components
from robustkit.training.images import Epoch, ImageSet
from robustkit.training.memory import PerturbationMemory, pack_signs, unpack_signs
from robustkit.training.method import Plan
from robustkit.training.train import Training

DRAW = torch.Generator().manual_seed(0)
IMAGES = ImageSet(torch.randint(256, (20, 24, 18, 3), dtype=torch.uint8, generator=DRAW), torch.arange(20) % 4)
PLAN = Plan(samples=20, classes=4, batch_size=8, epochs=5, lr=0.1, members=2)
ROWS = torch.tensor([3, 17, 0, 9])


@pytest.mark.parametrize("length", [1, 4, 7, 30])
def test_packed_perturbations_are_read_back(length: int) -> None:
    signs = torch.randint(-1, 2, (5, length), generator=DRAW).to(torch.int8)
    found = pack_signs(signs)
    assert found.dtype == torch.uint8
    assert found.shape == (5, -(-length // 4))
    assert torch.equal(unpack_signs(found)[:, :length], signs)
    assert not unpack_signs(found)[:, length:].any()


@pytest.mark.parametrize("augmentation", ["none", "crop", "crop-flip"])
def test_signs_follow_the_augmentation_of_their_pixels(augmentation: str) -> None:
    """Signs that follow from the pixels do so in every epoch, where nothing was cropped away."""
    memory = PerturbationMemory.of(IMAGES, 2)
    assert not memory.read(Epoch.of(IMAGES, PLAN, 0, components(augmentation)), ROWS).any()

    def by_pixels(epoch: Epoch) -> torch.Tensor:
        """1 above the middle and -1 below; the second member has the opposite. 0 outside the image."""
        moved = epoch.moved((IMAGES.pixels[ROWS] > 127).to(torch.int8) * 2 - 1, ROWS).permute(0, 3, 1, 2)
        return torch.stack([moved, -moved], 1)

    for number in range(4):
        epoch = Epoch.of(IMAGES, PLAN, number, components(augmentation))
        now = by_pixels(epoch)
        if number:
            found = memory.read(epoch, ROWS)
            assert found.dtype == torch.int8
            assert torch.equal(found[found != 0], now[found != 0])
            assert float((found != 0).float().mean()) > (0.5 if epoch.augmentation else 0.999)
        memory.write(epoch, ROWS, now)
        assert torch.equal(memory.read(epoch, ROWS), now)
    others = torch.ones(20, dtype=torch.bool)
    others[ROWS] = False
    assert not memory.read(epoch, torch.arange(20)[others]).any()


def test_the_memory_takes_two_bits_for_each_pixel_and_member() -> None:
    assert PerturbationMemory.of(IMAGES, 8).packed.numel() == IMAGES.pixels.numel() * 8 // 4


def test_a_lack_of_memory_is_refused_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    samples = from_arrays(torch.rand(64, 1, 8, 8, generator=DRAW), torch.arange(64) % 4)
    monkeypatch.setattr(training, "free_memory", lambda device: 2 * 64 * 64 + 100)
    words: dict[str, Any] = {
        "samples": samples,
        "device": torch.device("cpu"),
        "arch": "robustkit:digits-cnn",
        "batch_size": 8,
    }
    Training(method=make_method("dverge"), members=3, **words)
    with pytest.raises(UsageError, match="train on fewer with --limit"):
        Training(method=make_method("fasten"), members=3, **words)
