"""Images in memory, batches, augmentation against plain indexing; averages, scores, batch norms in closed form."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from robustkit import load_data
from robustkit.core.errors import UsageError
from robustkit.data import from_arrays
from robustkit.training import augment, averages, evaluation
from robustkit.training.images import Epoch, ImageSet, check_memory
from robustkit.training.method import Plan

N, C, H, W = 10, 3, 8, 16


def bytes_set(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (N, C, H, W), dtype=np.uint8), rng.integers(0, 4, N)


def test_uint8_images_are_kept_as_uint8_and_floats_as_floats() -> None:
    x, y = bytes_set()
    samples = from_arrays(torch.from_numpy(x), y)
    held = ImageSet.read(samples)
    assert held.pixels.dtype == torch.uint8
    assert torch.equal(held.at(slice(0, N)), samples.images(range(N)))
    assert held.at(slice(0, N)).is_contiguous(memory_format=torch.channels_last)
    digits = load_data("digits:test").head(20)
    floats = ImageSet.read(digits)
    assert floats.pixels.dtype == torch.float32
    assert torch.equal(floats.at(slice(0, 20)), digits.images(range(20)))


def test_a_set_whose_first_images_only_are_bytes_is_kept_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("robustkit.training.images._CHUNK", 4)
    x = torch.from_numpy(bytes_set()[0]).float() / 255
    x[7, 0, 0, 0] = 0.123456
    held = ImageSet.read(from_arrays(x, torch.zeros(N, dtype=torch.int64)))
    assert torch.equal(held.at(slice(0, N)), x)


def test_normalisation_has_mean_and_deviation_of_the_channels() -> None:
    x, y = bytes_set()
    mean, std = ImageSet.read(from_arrays(torch.from_numpy(x), y)).normalisation()
    real = x / 255
    np.testing.assert_allclose(mean, real.mean((0, 2, 3)), atol=6e-5)
    np.testing.assert_allclose(std, real.std((0, 2, 3)), atol=6e-5)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_moved_equals_pad_crop_and_flip(dtype: torch.dtype) -> None:
    pixels = torch.from_numpy(bytes_set()[0]).permute(0, 2, 3, 1).to(dtype)
    down, across = torch.tensor([0, 1, 2, 3, 4, 2, 2, 2, 0, 4]), torch.tensor([4, 3, 2, 1, 0, 2, 2, 2, 0, 4])
    mirrored = torch.tensor([False, True] * 5)
    found = augment.apply_moves(pixels, down, across, mirrored, 2)
    assert found.dtype == dtype
    for row in range(N):
        padded = torch.zeros(H + 4, W + 4, C, dtype=dtype)
        padded[2:-2, 2:-2] = pixels[row]
        expected = padded[down[row] : down[row] + H, across[row] : across[row] + W]
        assert torch.equal(found[row], expected.flip(1) if mirrored[row] else expected)
    assert torch.equal(found[6], pixels[6])


@pytest.mark.parametrize(
    ("data", "channels", "height", "expected"),
    [
        ("digits:train", 1, 8, "none"),
        ("mnist:train", 1, 28, "none"),
        ("svhn:train", 3, 32, "crop"),
        ("cifar10:train", 3, 32, "crop-flip"),
        ("/x/y.npz", 3, 32, "crop-flip"),
    ],
)
def test_default_augmentation(data: str, channels: int, height: int, expected: str) -> None:
    assert augment.default_augmentation(data, channels, height) == expected


def plan(batch: int = 4, **more: int) -> Plan:
    return Plan(samples=N, classes=4, batch_size=batch, epochs=3, lr=0.1, **more)


def held() -> ImageSet:
    x, _ = bytes_set()
    return ImageSet.read(from_arrays(torch.from_numpy(x), np.arange(N)))


def test_each_epoch_uses_every_image_once_in_another_order() -> None:
    images = held()
    orders = [Epoch.of(images, plan(), number, ()).order for number in range(4)]
    assert all(sorted(order.tolist()) == list(range(N)) for order in orders)
    assert len({tuple(order.tolist()) for order in orders}) == 4
    other = Epoch.of(images, plan(seed=1), 0, ()).order
    assert not torch.equal(other, orders[0])
    batches = [Epoch.of(images, plan(), 1, ()).batch(place) for place in range(2)]
    assert [batch.step for batch in batches] == [2, 3]
    assert torch.equal(torch.cat([batch.y for batch in batches]), orders[1][:8])
    assert torch.equal(batches[0].x, images.at(batches[0].y))


def test_parts_of_a_batch_join_to_the_batch() -> None:
    epoch = Epoch.of(held(), plan(), 2, ("crop", "flip"))
    whole, parts = epoch.batch(1), [epoch.batch(1, part, 2) for part in range(2)]
    assert torch.equal(torch.stack([part.x for part in parts], 1).flatten(0, 1), whole.x)
    assert torch.equal(torch.stack([part.rng.uniform(3) for part in parts], 1).flatten(0, 1), whole.rng.uniform(3))


def test_augmentation_is_independent_of_the_batch_size() -> None:
    small, large = (Epoch.of(held(), plan(batch), 0, ("crop", "flip")) for batch in (2, 8))
    assert torch.equal(torch.cat([small.batch(place).x for place in range(4)]), large.batch(0).x)


def test_augmentation_shifts_images_and_flips_about_half() -> None:
    images = ImageSet(torch.arange(16, dtype=torch.uint8).expand(400, 8, 16)[..., None], torch.arange(400))
    size = Plan(samples=400, classes=400, batch_size=400, epochs=1, lr=0.1)
    x = (Epoch.of(images, size, 0, ("crop", "flip")).batch(0).x * 255).round()
    rising = x[:, 0, 4, 8] > x[:, 0, 4, 7]
    assert 150 < int(rising.sum()) < 250
    straight = (Epoch.of(images, size, 0, ("crop",)).batch(0).x * 255).round()
    shifts = straight[:, 0, 4, 8] - 8
    assert sorted(set(shifts.tolist())) == [-1, 0, 1]


def test_a_set_that_does_not_fit_into_memory_is_refused() -> None:
    with pytest.raises(UsageError, match="--limit"):
        check_memory(load_data("digits:test"), 1000)


def test_the_weight_average_is_the_geometric_sum() -> None:
    net = nn.BatchNorm1d(2)
    average = averages.copy_state(net)
    values = [1.0, 2.0, 5.0]
    for value in values:
        with torch.no_grad():
            net.weight.fill_(value)
            net.num_batches_tracked.add_(1)
        averages.update_average(average, net, 0.9)
    expected = 0.9**3 + sum(0.1 * 0.9 ** (2 - step) * value for step, value in enumerate(values))
    torch.testing.assert_close(average["weight"], torch.full((2,), expected))
    assert int(average["num_batches_tracked"]) == 3
    with averages.averaged_weights([net], [average]):
        torch.testing.assert_close(net.weight.detach(), torch.full((2,), expected))
    assert net.weight.tolist() == [5.0, 5.0]


def test_mean_probabilities_accuracy_and_loss_of_two_members() -> None:
    first, second = torch.tensor([[0.9, 0.1], [0.2, 0.8]]), torch.tensor([[0.5, 0.5], [0.7, 0.3]])
    together = evaluation.mean_of_probabilities(probabilities.log() for probabilities in (first, second))
    torch.testing.assert_close(together.exp(), (first + second) / 2)
    accuracy, loss = evaluation.accuracy_and_loss(together, torch.tensor([0, 0]))
    assert accuracy == 0.5
    assert loss == pytest.approx(-(math.log(0.7) + math.log(0.45)) / 2, rel=1e-6)
    certain = torch.tensor([[0.0, -torch.inf]])
    torch.testing.assert_close(evaluation.mean_of_probabilities([certain, certain]), certain)


def test_re_estimated_statistics_are_those_of_the_images() -> None:
    images = held()
    net = nn.Sequential(nn.BatchNorm2d(C), nn.Flatten(), nn.Linear(C * H * W, 4)).eval()
    net[0].running_mean.fill_(9)
    momentum = net[0].momentum
    evaluation.re_estimate_batch_norms(net, images, 5)
    torch.testing.assert_close(net[0].running_mean, images.at(slice(0, N)).mean((0, 2, 3)))
    assert net[0].momentum == momentum
    assert not net.training
