"""Image files: order, colour modes, sizes, damage; ImageNet's class folders."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets, transforms

from robustkit.data import load_data
from robustkit.errors import UsageError
from robustkit.preprocess import Preprocess

H, W = 9, 7


def picture(seed: int, height: int = H, width: int = W) -> Image.Image:
    return Image.fromarray(np.random.RandomState(seed).randint(0, 256, (height, width, 3)).astype(np.uint8))


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Three classes of ten equal-sized images."""
    root = tmp_path / "val"
    for label, name in enumerate(("ape", "bee", "cat")):
        (root / name / "deeper").mkdir(parents=True)
        for number in range(10):
            place = root / name / "deeper" if number == 0 else root / name
            picture(10 * label + number).save(place / f"{number}.png")
    return root


def test_images_and_labels_are_those_of_image_folder(tree: Path) -> None:
    samples = load_data(f"folder:{tree}/")
    assert samples.name == f"folder:{tree}"
    assert samples.classes == ("ape", "bee", "cat")
    x = samples.images(range(30))
    assert x.dtype == torch.float32
    assert x.shape == (30, 3, H, W)
    assert x.is_contiguous()
    found = {(image.numpy().tobytes(), int(label)) for image, label in zip(x, samples.labels, strict=True)}
    listing = datasets.ImageFolder(str(tree), transforms.ToTensor())
    assert found == {(image.numpy().tobytes(), label) for image, label in listing}


def test_the_first_images_are_of_all_classes_and_always_the_same(tree: Path) -> None:
    samples = load_data(f"folder:{tree}")
    assert samples.labels[:10].tolist() == [0, 2, 1, 1, 2, 2, 2, 1, 1, 2]
    assert torch.equal(samples.head(10).images([9, 2]), load_data(f"folder:{tree}").images([9, 2]))


def test_a_relative_folder_is_named_absolutely(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tree.parent)
    assert load_data("folder:./val").name == f"folder:{tree}"


@pytest.mark.parametrize("resize", [None, 6, 24])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "nearest"])
def test_preprocessing_is_that_of_torchvision(tree: Path, resize: int | None, interpolation: str) -> None:
    picture(99, 50, 31).save(tree / "ape" / "other-size.png")
    steps = [transforms.CenterCrop((5, 4)), transforms.ToTensor()]
    if resize is not None:
        steps.insert(0, transforms.Resize(resize, transforms.InterpolationMode(interpolation)))
    expected = {image.numpy().tobytes() for image, _ in datasets.ImageFolder(str(tree), transforms.Compose(steps))}
    samples = load_data(f"folder:{tree}", preprocess=Preprocess((5, 4), resize, interpolation))
    x = samples.images(range(31))
    assert x.shape == (31, 3, 5, 4)
    assert {image.numpy().tobytes() for image in x} == expected
    assert samples.images([]).shape == (0, 3, 5, 4)


def test_an_unknown_interpolation_is_named(tree: Path) -> None:
    with pytest.raises(UsageError, match=r"no interpolation 'bilinaer'\. Did you mean 'bilinear'\?"):
        load_data(f"folder:{tree}", preprocess=Preprocess((5, 4), 6, "bilinaer"))


@pytest.mark.parametrize("mode", ["L", "LA", "1", "P", "RGBA", "CMYK", "P with alpha"])
def test_every_colour_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    (tmp_path / "a").mkdir()
    image = picture(0).convert(mode.split()[0])
    if mode == "P with alpha":
        image.save(tmp_path / "a" / "0.png", transparency=bytes(range(256)))
    else:
        image.save(tmp_path / "a" / ("0.tif" if mode == "CMYK" else "0.png"))
    x = load_data(f"folder:{tmp_path}").images([0])
    expected = np.asarray(image.convert("RGB")).transpose(2, 0, 1)
    assert np.array_equal(x[0].numpy() * 255, expected)


def test_deep_images_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    Image.fromarray(np.full((H, W), 1000, np.uint16)).save(tmp_path / "a" / "0.png")
    with pytest.raises(UsageError, match=r"a/0\.png has more than 8 bits per pixel .*; write it as an 8-bit"):
        load_data(f"folder:{tmp_path}").images([0])


def test_unequal_sizes_need_a_model_with_a_size(tree: Path) -> None:
    picture(99, 8, 7).save(tree / "ape" / "odd.png")
    samples = load_data(f"folder:{tree}")
    with pytest.raises(UsageError, match=r"odd\.png is 8 x 7 pixels, other images are 9 x 7; .*\?size=N"):
        samples.images(range(31))


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:80])


def scribble(file: Path) -> None:
    file.write_bytes(b"no image")


def empty(file: Path) -> None:
    file.write_bytes(b"")


@pytest.mark.parametrize("damage", [cut, scribble, empty, Path.unlink])
def test_a_damaged_image_is_named(tree: Path, damage: Callable[[Path], None]) -> None:
    samples = load_data(f"folder:{tree}")
    damage(tree / "bee" / "4.png")
    with pytest.raises(
        UsageError, match=r"/val/bee/4\.png cannot be read as an image .*; replace it or remove it"
    ):
        samples.images(range(30))


def test_images_are_decoded_only_when_asked_for(tree: Path) -> None:
    for file in tree.rglob("*.png"):
        scribble(file)
    samples = load_data(f"folder:{tree}")
    assert len(samples) == 30
    with pytest.raises(UsageError, match="cannot be read"):
        samples.images([0])


def test_fingerprint_moves_with_the_folder_and_changes_with_it(tree: Path, tmp_path: Path) -> None:
    original = load_data(f"folder:{tree}").fingerprint
    copy = tmp_path / "elsewhere" / "copy"
    shutil.copytree(tree, copy)
    assert load_data(f"folder:{copy}").fingerprint == original
    assert load_data(f"folder:{copy}", preprocess=Preprocess((5, 4), 6)).fingerprint != original
    with (copy / "ape" / "3.png").open("ab") as file:
        file.write(b"\0")
    assert load_data(f"folder:{copy}").fingerprint != original
    shutil.copy(tree / "ape" / "3.png", copy / "ape" / "3.png")
    opened = load_data(f"folder:{copy}")
    (copy / "ape").rename(copy / "ant")
    with pytest.raises(UsageError, match=r"cannot be read as an image .*No such file"):
        _ = opened.fingerprint
    assert load_data(f"folder:{copy}").fingerprint != original


def test_folders_that_hold_no_classes(tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    with pytest.raises(UsageError, match=f"^{missing} is not there; write folder:PATH"):
        load_data(f"folder:{missing}")
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(UsageError, match=f"^{file} is a file; write folder:PATH"):
        load_data(f"folder:{file}")
    flat = tmp_path / "flat"
    flat.mkdir()
    picture(0).save(flat / "0.png")
    with pytest.raises(UsageError, match=f"^{flat} is not one folder of images per class: Couldn't find any"):
        load_data(f"folder:{flat}")
    (flat / "empty").mkdir()
    with pytest.raises(UsageError, match=r"no valid file for the classes empty\.$"):
        load_data(f"folder:{flat}")


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A thousand class folders of one tiny image each."""
    root = tmp_path_factory.mktemp("imagenet")
    for label in range(1000):
        folder = root / "imagenet" / "val" / f"n{label:08d}"
        folder.mkdir(parents=True)
        image = Image.new("RGB", (2, 2), (label % 256, label // 256, 0))
        image.save(folder / "image.png")
    return root


@pytest.mark.parametrize("inside", [".", "imagenet"])
def test_imagenet_is_read_from_its_class_folders(imagenet: Path, inside: str) -> None:
    samples = load_data("imagenet", root=imagenet / inside, preprocess=Preprocess((3, 3), 3))
    assert samples.name == "imagenet:val"
    assert len(samples) == len(samples.classes or ()) == 1000
    red, green, _ = (samples.images(range(20))[:, :, 1, 1] * 255).round().long().T
    assert (red + 256 * green).tolist() == samples.labels[:20].tolist()


def test_imagenet_that_is_not_there_or_not_whole(tmp_path: Path) -> None:
    looked = f"imagenet:train is neither in {tmp_path}/imagenet/train nor in {tmp_path}/train, and it cannot be"
    with pytest.raises(UsageError, match=f"^{looked} downloaded; unpack it there.*--data-root DIR"):
        load_data("imagenet:train", root=tmp_path, download=True)
    (tmp_path / "train" / "n0").mkdir(parents=True)
    picture(0).save(tmp_path / "train" / "n0" / "0.png")
    with pytest.raises(UsageError, match="has 1 class folders instead of ImageNet's 1000; write folder:"):
        load_data("imagenet:train", root=tmp_path)
