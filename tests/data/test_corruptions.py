"""Common corruptions: closed forms, determinism, shapes, ready-made files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import ndimage

from robustkit.core.errors import UsageError
from robustkit.core.rng import RowRng
from robustkit.data import load_data
from robustkit.data.corruptions import blur, digital, noise, plasma, sampling, weather
from robustkit.data.corruptions.names import FAMILIES, NAMES
from robustkit.data.corruptions.samples import corrupted
from robustkit.data.corruptions.table import CORRUPTIONS, corrupt
from robustkit.data.sources.arrays import from_arrays

IDS = torch.tensor([3, 2**32 - 1])


def images(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0))


def rng(rows: int = 2) -> RowRng:
    return RowRng(0, "test", torch.arange(rows))


def test_names_are_those_of_the_table() -> None:
    assert list(CORRUPTIONS) == list(NAMES)
    assert sum(map(len, FAMILIES.values())) == 15


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(2, 3, 8, 11), (2, 1, 36, 33), (2, 4, 50, 48)])
def test_a_corruption_keeps_shape_and_box_and_depends_on_one_image(name: str, shape: tuple[int, ...]) -> None:
    x = images(*shape)
    for severity in (1, 5):
        together = corrupt(x, name, severity, IDS)
        assert together.shape == x.shape
        assert together.dtype == torch.float32
        assert together.amin() >= 0
        assert together.amax() <= 1
        alone = corrupt(x[1:], name, severity, IDS[1:])
        assert torch.equal(together[1:], alone)


@pytest.mark.parametrize("name", NAMES)
def test_large_images_get_the_constants_of_imagenet_c(name: str) -> None:
    kind = CORRUPTIONS[name]
    assert kind.constants(3, 224) == pytest.approx(kind.large[2])
    assert kind.constants(3, 32) == pytest.approx(kind.small[2])
    doubled = kind.constants(2, 64)
    for place, (at_64, at_32) in enumerate(zip(doubled, kind.small[1], strict=True)):
        assert at_64 == pytest.approx(2 * at_32 if place in kind.lengths else at_32)
    assert kind.constants(2, 100) != kind.constants(2, 64) or kind.small[1] == kind.large[1]


def test_noise_has_the_stated_distribution() -> None:
    grey = torch.full((2, 3, 60, 70), 0.5)
    assert (noise.gaussian_noise(grey, rng(), 0.1) - 0.5).std() == pytest.approx(0.1, rel=0.05)
    shot = noise.shot_noise(grey, rng(), 40)
    assert shot.mean() == pytest.approx(0.5, rel=0.02)
    assert shot.var() == pytest.approx(0.5 / 40, rel=0.1)
    impulse = noise.impulse_noise(grey, rng(), 0.2)
    assert (impulse == 1).float().mean() == pytest.approx(0.1, abs=0.01)
    assert (impulse == 0).float().mean() == pytest.approx(0.1, abs=0.01)


def test_blurs_keep_constant_images_and_reduce_variance() -> None:
    flat, x = torch.full((2, 3, 20, 26), 0.25), images(2, 3, 20, 26)
    for function, constants in (
        (blur.defocus_blur, (2, 0.5)),
        (blur.glass_blur, (0.5, 1, 1)),
        (blur.motion_blur, (5, 3)),
        (blur.zoom_blur, (1.2, 0.02)),
    ):
        torch.testing.assert_close(function(flat, rng(), *constants), flat)
        assert function(x, rng(), *constants).var() < x.var()


def test_motion_blur_at_angle_0_is_a_weighted_mean_to_the_right() -> None:
    x = images(1, 2, 3, 9)
    weights = np.exp(-0.5 * (np.arange(5) / 1.5) ** 2)
    weights /= weights.sum()
    padded = torch.cat([x, x[..., -1:].expand(1, 2, 3, 4)], 3)
    expected = sum(float(w) * padded[..., i : i + 9] for i, w in enumerate(weights))
    torch.testing.assert_close(sampling.motion_blur(x, 2, 1.5, torch.zeros(1)), expected)


def test_sampling_at_whole_pixels_is_the_image() -> None:
    x = images(2, 3, 5, 7)
    rows, columns = sampling.pixel_grid(x)
    torch.testing.assert_close(sampling.sample(x, rows.expand(2, 5, 7), columns.expand(2, 5, 7)), x)
    assert torch.equal(sampling.zoom(x, 1.0), x)


def test_glass_blur_of_reach_1_moves_each_pixel_to_the_upper_left_at_most_by_1() -> None:
    ramp = torch.arange(30.0)[None, None, :, None].expand(1, 1, 30, 30) / 30
    moved = blur.glass_blur(ramp.contiguous(), rng(1), 1e-3, 1, 1) * 30
    offset = (moved[0, 0] - torch.arange(30.0)[:, None]).round()
    assert set(offset.unique().tolist()) == {-1.0, 0.0}
    assert (offset[2:, 2:] == -1).float().mean() == pytest.approx(0.5, abs=0.06)


def test_clouds_fill_the_unit_interval_and_differ_by_image() -> None:
    field = plasma.clouds(rng(3), 20, 33, 2.0)
    assert field.shape == (3, 20, 33)
    whole = plasma.clouds(rng(3), 64, 64, 2.0)
    assert torch.equal(whole.amin((1, 2)), torch.zeros(3))
    assert torch.equal(whole.amax((1, 2)), torch.ones(3))
    assert not torch.equal(whole[0], whole[1])
    # A larger decay is smoother.
    rough, smooth = (plasma.clouds(rng(3), 64, 64, decay).diff(dim=1).abs().mean() for decay in (1.3, 3.0))
    assert smooth < rough / 2


def test_brightness_and_contrast_in_closed_form() -> None:
    x = torch.tensor([[0.2, 0.4, 0.1], [0.0, 0.0, 0.0]]).view(2, 3, 1, 1).expand(2, 3, 4, 5)
    bright = weather.brightness(x, rng(), 0.4)
    torch.testing.assert_close(bright[0, :, 0, 0], torch.tensor([0.4, 0.8, 0.2]))
    torch.testing.assert_close(bright[1], torch.full((3, 4, 5), 0.4))
    y = images(2, 3, 6, 5)
    torch.testing.assert_close(digital.contrast(y, rng(), 0.5).mean((2, 3)), y.mean((2, 3)))
    torch.testing.assert_close(digital.contrast(y, rng(), 0.5).std((2, 3)), 0.5 * y.std((2, 3)))


def test_fog_keeps_the_brightest_value_within_its_range() -> None:
    x = images(2, 3, 16, 19)
    assert weather.fog(x, rng(), 1.0, 2.0).amax() <= x.amax() + 1e-6


def test_pixelate_equals_pillows_box_filter() -> None:
    image_module = pytest.importorskip("PIL.Image")
    x = images(1, 1, 40, 27)
    picture = image_module.fromarray(x[0, 0].numpy())
    small = picture.resize((int(27 * 0.4), int(40 * 0.4)), image_module.BOX)
    expected = np.asarray(small.resize((27, 40), image_module.BOX))
    np.testing.assert_allclose(digital.pixelate(x, rng(1), 0.4)[0, 0], expected, atol=1e-5)


def test_elastic_without_strength_is_the_image_and_its_field_is_smooth() -> None:
    x = images(2, 3, 32, 40)
    torch.testing.assert_close(digital.elastic_transform(x, rng(), 0, 0, 0), x, atol=1e-4, rtol=0)
    smooth = torch.from_numpy(ndimage.gaussian_filter(x.numpy(), (0, 0, 3, 3)))
    moved = digital.elastic_transform(smooth, rng(), 2.0, 4.0, 1.0)
    assert 0 < (moved - smooth).abs().mean() < 0.1


def test_jpeg_of_a_flat_image_is_the_image() -> None:
    flat = torch.full((2, 3, 16, 24), 100 / 255)
    torch.testing.assert_close(digital.jpeg_compression(flat, rng(), 90), flat, atol=1.01 / 255, rtol=0)


def test_a_data_string_names_a_corruption() -> None:
    clean = load_data("digits:test").head(5)
    foggy = load_data("digits:test?corruption=fog@3").head(5)
    assert foggy.name == "digits:test?corruption=fog@3"
    assert torch.equal(foggy.images([1, 4]), corrupted(clean, "fog", 3).images([1, 4]))
    assert torch.equal(foggy.images([4, 1]), foggy.images([1, 4]).flip(0))
    assert foggy.fingerprint != clean.fingerprint
    assert np.array_equal(foggy.labels, clean.labels)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [("fgo@3", "Did you mean 'fog'"), ("fog@6", "severity from 1 to 5"), ("fog", "severity from 1 to 5")],
)
def test_a_wrong_corruption_is_named(text: str, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        load_data(f"digits:test?corruption={text}")


def test_ready_made_files_are_read(tmp_path: Path) -> None:
    folder = tmp_path / "a folder"
    folder.mkdir()
    stored = np.random.default_rng(0).integers(0, 256, (20, 6, 5, 3), np.uint8)
    np.save(folder / "fog.npy", stored)
    np.save(folder / "labels.npy", np.tile(np.arange(4), 5))
    samples = load_data(f"cifar-c:{folder}?corruption=fog@3")
    assert samples.labels.tolist() == [0, 1, 2, 3]
    expected = torch.from_numpy(stored[8:12]).permute(0, 3, 1, 2) / 255
    torch.testing.assert_close(samples.images(range(4)), expected)
    with pytest.raises(UsageError, match="no clean images"):
        load_data(f"cifar-c:{folder}").images([0])
    with pytest.raises(UsageError, match=r"no file .*snow\.npy"):
        load_data(f"cifar-c:{folder}?corruption=snow@1")
    np.save(folder / "snow.npy", stored[:7])
    with pytest.raises(UsageError, match="7 images, but 4 labels need 20"):
        load_data(f"cifar-c:{folder}?corruption=snow@1")


def test_arrays_of_one_channel_are_corrupted_too() -> None:
    samples = from_arrays(images(3, 1, 9, 12), [0, 1, 2])
    assert corrupted(samples, "snow", 2).images([0, 2]).shape == (2, 1, 9, 12)
