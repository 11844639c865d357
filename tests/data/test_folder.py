"""Image files: order, colour modes, sizes, damage; ImageNet's class folders."""

from __future__ import annotations

import os
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets, transforms

from robustkit.core.errors import UsageError
from robustkit.core.preprocess import Preprocess
from robustkit.data import load_data

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


def test_images_are_decoded_only_when_requested(tree: Path) -> None:
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
    opened = load_data(f"folder:{copy}")
    (copy / "ape").rename(copy / "ant")
    with pytest.raises(UsageError, match=r"cannot be read as an image .*No such file"):
        _ = opened.fingerprint
    # Same pictures, same labels: what they are called does not count.
    assert load_data(f"folder:{copy}").fingerprint == original


def test_another_picture_of_the_same_size_and_time_is_another_fingerprint(tree: Path) -> None:
    file = tree / "ape" / "3.png"
    content, state = bytearray(file.read_bytes()), file.stat()
    original = load_data(f"folder:{tree}").fingerprint
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert load_data(f"folder:{tree}").fingerprint != original


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
    with pytest.raises(UsageError, match="per class: it holds 1 pictures but no folder; put the"):
        load_data(f"folder:{flat}")
    (flat / "empty").mkdir()
    with pytest.raises(UsageError, match="per class: 'empty' holds no picture; remove that folder"):
        load_data(f"folder:{flat}")


def test_hidden_folders_and_files_are_left_out_with_a_line(tree: Path) -> None:
    (tree / ".ipynb_checkpoints").mkdir()
    (tree / "__MACOSX").mkdir()
    for place in (".ipynb_checkpoints/0.png", "__MACOSX/0.png", "bee/._0.png", "loose.png"):
        picture(0).save(tree / place)
    (tree / ".DS_Store").touch()
    samples = load_data(f"folder:{tree}")
    assert (len(samples), samples.classes) == (30, ("ape", "bee", "cat"))
    assert samples.notes == (
        "left out 3 hidden folders and files: .ipynb_checkpoints, __MACOSX, bee/._0.png",
        "left out 1 pictures beside the class folders: loose.png",
    )


@pytest.mark.parametrize(
    ("parts", "named"),
    [
        (("train", "val"), "val"),
        (("Test_set", "Training"), "Test_set"),
        (("train2017", "val2017"), "val2017"),
        (("pictures",), "pictures"),
        (("x", "y"), "x"),
    ],
)
def test_a_folder_above_the_class_folders_is_refused(parts: tuple[str, ...], named: str, tmp_path: Path) -> None:
    for part in parts:
        for name in ("ape", "bee"):
            (tmp_path / part / name).mkdir(parents=True)
            picture(0).save(tmp_path / part / name / "0.png")
    with pytest.raises(UsageError, match=f"class folders are inside these; write folder:{tmp_path}/{named}, or"):
        load_data(f"folder:{tmp_path}")
    assert load_data(f"folder:{tmp_path}?classes={','.join(('z', *parts))}").labels.min() == 1


def test_classes_may_have_folders_inside(tmp_path: Path) -> None:
    for place in ("ape/images", "bee/images", "cat/here", "cat/there"):
        (tmp_path / place).mkdir(parents=True)
        picture(0).save(tmp_path / place / "0.png")
    assert load_data(f"folder:{tmp_path}").labels.tolist().count(2) == 2


def test_what_is_no_ordinary_file_is_never_opened(tree: Path) -> None:
    samples = load_data(f"folder:{tree}")
    (tree / "bee" / "4.png").unlink()
    os.mkfifo(tree / "bee" / "4.png")
    with pytest.raises(UsageError, match=r"bee/4\.png cannot be read as an image \(it is a named pipe"):
        samples.images(range(30))
    with pytest.raises(UsageError, match=r"bee/4\.png is a pipe, a socket or a device, not a picture; remove it"):
        load_data(f"folder:{tree}")
    (tree / "bee" / "4.png").unlink()
    (tree / "bee" / "loop").symlink_to(tree)
    assert len(load_data(f"folder:{tree}")) < 100


def header_of(width: int, height: int) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    size = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + size + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is none of JPEG, PNG, WEBP, PPM, BMP, TIFF, GIF"),
        (b"8BPS" + bytes(40), "is none of JPEG"),
        (header_of(40_000, 40_000), "has more than 89,478,485 pixels; make it smaller or remove it"),
        (header_of(10_000, 10_000), "has more than 89,478,485 pixels"),
        (header_of(2**31 - 1, 2**31 - 1), "has more than 89,478,485 pixels"),
        (header_of(0, 4), "cannot be read as an image"),
    ],
)
def test_only_documented_formats_of_a_sensible_size_are_decoded(
    content: bytes, sentence: str, tmp_path: Path
) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "0.png").write_bytes(content)
    with pytest.raises(UsageError, match=f"0.png .*{sentence}"):
        load_data(f"folder:{tmp_path}").images([0])


def test_exif_rotation_is_flagged_and_not_applied(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    exif = Image.Exif()
    exif[274] = 6
    for name in ("0.jpg", "1.webp", "2.png"):
        picture(0).save(tmp_path / "a" / name, exif=exif)
    picture(0).save(tmp_path / "a" / "3.jpg")
    samples = load_data(f"folder:{tmp_path}")
    (flag,) = samples.flags
    assert (flag.code, flag.value) == ("exif-rotation", 3)
    assert "it is not applied, as in the transforms of torchvision and timm" in flag.meaning
    assert samples.images(range(4)).shape == (4, 3, H, W)


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
