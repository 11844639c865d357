"""WebDataset's shards: which images with which labels, by which index; what a bad shard says; reading ahead."""

from __future__ import annotations

import io
import os
import tarfile
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image

from robustkit.core.errors import UsageError
from robustkit.core.flags import Flag
from robustkit.core.preprocess import Preprocess
from robustkit.data import from_arrays, load_data
from robustkit.data.prefetch import read_ahead
from robustkit.data.samples import Samples
from robustkit.data.sources import tar_index
from robustkit.data.sources.tar_headers import headers

H, W = 9, 7
LONG = (
    "a/folder/with/a/name/that/is/long/enough/to/need/more/than/the/hundred/bytes/of/a/plain/header/of/a/tar/file/"
)


def pixels(seed: int) -> npt.NDArray[np.uint8]:
    return np.random.RandomState(seed).randint(0, 256, (H, W, 3)).astype(np.uint8)


def png(seed: int) -> bytes:
    packed = io.BytesIO()
    Image.fromarray(pixels(seed)).save(packed, "png")
    return packed.getvalue()


def write(place: Path, files: Iterable[tuple[str, bytes]], form: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(place, "w", format=form) as shard:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            shard.addfile(member, io.BytesIO(content))
    return place


def sample(seed: int, key: str = "") -> list[tuple[str, bytes]]:
    key = key or f"{seed:04d}"
    return [(f"{key}.cls", f"{seed % 3}\n".encode()), (f"{key}.json", b"{}"), (f"{key}.png", png(seed))]


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Three shards of five images; one has long names, in either of the ways to write them."""
    (tmp_path / "set").mkdir()
    for number in range(3):
        keys = [f"{LONG if number else ''}{5 * number + k:04d}" for k in range(5)]
        files = [file for k, key in enumerate(keys) for file in sample(5 * number + k, key)]
        form = tarfile.GNU_FORMAT if number == 1 else tarfile.PAX_FORMAT
        write(tmp_path / "set" / f"{number:03d}.tar", [("README", b"no kind"), *files, ("note.txt", b"")], form)
    return tmp_path / "set"


def load(shards: Path, tail: str = "", preprocess: Preprocess | None = None) -> Samples:
    return load_data(f"webdataset:{shards}{tail}", root=shards.parent / "root", preprocess=preprocess)


@pytest.mark.parametrize("tail", ["", "/{000..002}.tar"])
def test_images_and_labels_are_those_of_the_shards(shards: Path, tail: str) -> None:
    samples = load(shards, tail)
    assert samples.name == f"webdataset:{shards}{tail}"
    assert len(samples) == 15
    x = samples.images(range(15))
    assert x.dtype == torch.float32
    assert x.shape == (15, 3, H, W)
    found = {
        ((image.permute(1, 2, 0) * 255).byte().numpy().tobytes(), int(y))
        for image, y in zip(x, samples.labels, strict=True)
    }
    assert found == {(pixels(seed).tobytes(), seed % 3) for seed in range(15)}
    assert torch.equal(samples.head(4).images([3, 0]), x[[3, 0]])


def test_the_first_images_are_a_random_sample_and_always_the_same(shards: Path) -> None:
    assert load(shards).labels.tolist() == [1, 0, 2, 0, 2, 1, 2, 1, 1, 1, 2, 0, 0, 2, 0]


def test_one_shard_and_part_of_them(shards: Path) -> None:
    assert len(load(shards, "/001.tar")) == 5
    assert len(load(shards, "/{001..002}.tar")) == 10


def test_images_are_brought_to_one_size(shards: Path) -> None:
    assert load(shards, preprocess=Preprocess((4, 5), 6)).images([2, 1]).shape == (2, 3, 4, 5)
    with pytest.raises(UsageError, match="no interpolation 'bilinaer'"):
        load(shards, preprocess=Preprocess((4, 5), 6, "bilinaer"))


def test_the_index_is_made_once_and_again_when_a_shard_changes(
    shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load(shards)
    with monkeypatch.context() as patch:
        patch.setattr(tar_index, "_members", None)
        again = load(shards)
    assert np.array_equal(again.labels, first.labels)
    assert torch.equal(again.images([7]), first.images([7]))
    write(shards / "002.tar", sample(3))
    assert len(load(shards)) == 11
    for index in (shards.parent / "root" / "index").iterdir():
        index.write_bytes(b"damaged")
    assert len(load(shards)) == 11


def test_where_the_index_cannot_be_kept_it_is_made_each_time(shards: Path) -> None:
    (shards.parent / "root").write_text("a file where the folder should be")
    assert len(load(shards)) == len(load(shards)) == 15


def test_fingerprint_is_of_images_and_labels(shards: Path, tmp_path: Path) -> None:
    original = load(shards).fingerprint
    assert load(shards, preprocess=Preprocess((4, 5), 6)).fingerprint != original
    shards.rename(tmp_path / "moved")
    assert load(tmp_path / "moved").fingerprint == original
    shard = tmp_path / "moved" / "000.tar"
    content, state = bytearray(shard.read_bytes()), shard.stat()
    content[content.index(png(0)) + 60] ^= 1
    shard.write_bytes(content)
    os.utime(shard, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert load(tmp_path / "moved").fingerprint != original


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        ([("7.png", png(0))], "sample '7' has no label; write its class as a number in 7.cls"),
        ([("7.cls", b"0")], "sample '7' has no image; write one image each, as 7.jpg"),
        ([("7.cls", b"0"), ("7.png", png(0)), ("7.jpg", b"")], r"'7' has 7\.png and 7\.jpg; write one image each"),
        ([("7.cls", b"cat"), ("7.png", png(0))], r"7\.cls holds 'cat'; write a class as a whole number from 0 up"),
        ([("7.cls", b"-1"), ("7.png", png(0))], r"7\.cls holds '-1'; write a class as a whole number from 0 up"),
        ([("7.cls", b"9" * 40), ("7.png", png(0))], r"7\.cls holds '9{32}'; write a class as a whole number"),
        ([("7.txt", b"0")], "holds no samples; write images as KEY.jpg, or such, each with KEY.cls"),
    ],
)
def test_a_malformed_sample_is_named(tmp_path: Path, files: list[tuple[str, bytes]], sentence: str) -> None:
    shard = write(tmp_path / "0.tar", files)
    with pytest.raises(UsageError, match=f"{shard}.*{sentence}"):
        load(shard)


@pytest.mark.parametrize("left", [0, 100, 512 + 100, 2048 + 20])
def test_a_shard_that_is_cut_off_is_named(tmp_path: Path, left: int) -> None:
    shard = write(tmp_path / "0.tar", [*sample(0), *sample(1)])
    shard.write_bytes(shard.read_bytes()[:left])
    with pytest.raises(
        UsageError, match=rf"^{shard} cannot be read as a tar file \(.*copy or write it again, uncom"
    ):
        load(shard)


def test_a_shard_with_a_damaged_header_in_the_middle_is_named(tmp_path: Path) -> None:
    shard = write(tmp_path / "0.tar", [*sample(0), *sample(1)])
    content = bytearray(shard.read_bytes())
    offset = content.index(b"0001.cls")
    content[offset] = ord("9")
    shard.write_bytes(content)
    with pytest.raises(UsageError, match=r"cannot be read as a tar file \(it is cut off or damaged\)"):
        load(shard)


def header(name: bytes, size: int, kind: bytes = b"0") -> bytes:
    """The header of a member of any length, as GNU tar writes those that octal digits cannot say."""
    large = (b"\xff" if size < 0 else b"\x80") + (size % 2**88).to_bytes(11, "big")
    block = bytearray(name.ljust(100, b"\0") + b"0000644\0" + bytes(16) + large + bytes(12) + b" " * 8 + kind)
    block += bytes(100) + b"ustar\x0000" + bytes(247)
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def extended(key: bytes, value: bytes) -> bytes:
    record = b" " + key + b"=" + value + b"\n"
    record = b"%d" % (len(record) + 2) + record
    return header(b"pax", len(record), b"x") + record.ljust(512, b"\0")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (header(b"a.png", -512), "a member has a length of -512 bytes"),
        (header(b"a.png", -1024, b"L"), "a member has a length of -1024 bytes"),
        (header(b"a.png", 2**60), "it is cut off or damaged"),
        (header(b"a", 2**31, b"L"), "a header has 2,147,483,648 bytes, more than 1,048,576"),
        (extended(b"size", b"-512") + header(b"a.png", 0), "a length is '-512', which is no whole number"),
        (extended(b"GNU.sparse.major", b"1") + header(b"a.png", 0), "a.png is a sparse file, which is not read"),
        (header(b"a.png", 512, b"S") + bytes(512), "a.png is a sparse file, which is not read"),
    ],
)
def test_impossible_lengths_are_refused(content: bytes, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "0.tar").write_bytes(content + bytes(1024))
    with pytest.raises(UsageError, match=rf"^{tmp_path}/0.tar cannot be read as a tar file \({sentence}"):
        load(tmp_path / "0.tar")


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_headers_are_those_that_tarfile_reads(form: int, tmp_path: Path) -> None:
    names = ["a.png", "ü/ß.cls", "f" * 90 + "/" + "g" * 95 + ".x"]
    names += [] if form == tarfile.USTAR_FORMAT else ["h" * 300 + "/i.jpg"]
    write(tmp_path / "0.tar", [(name, bytes(number * 700)) for number, name in enumerate(names)], form)
    with tarfile.open(tmp_path / "0.tar", "a", format=form) as shard:
        for kind in (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE):
            member = tarfile.TarInfo("other.png")
            member.type, member.linkname = kind, "a.png"
            shard.addfile(member)
    with tarfile.open(tmp_path / "0.tar") as shard:
        expected = [(file.name, file.offset_data, file.size) for file in shard if file.isreg()]
    with (tmp_path / "0.tar").open("rb") as file:
        assert [tuple(found) for found in headers(file, (tmp_path / "0.tar").stat().st_size)] == expected


def test_hidden_files_in_a_shard_are_left_out(tmp_path: Path) -> None:
    hidden = [(f"{folder}{name}", b"") for folder in ("__MACOSX/", ".x/", "") for name in ("._0.png", "._0.cls")]
    assert len(load(write(tmp_path / "0.tar", [*hidden, *sample(0, "./a/0000")]))) == 1


def test_compressed_shards_are_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "0.tar", "w:gz") as shard:
        shard.addfile(tarfile.TarInfo("0.png"))
    with pytest.raises(UsageError, match=r"cannot be read as a tar file .*uncompressed"):
        load(tmp_path / "0.tar")


def test_an_unreadable_image_is_named(tmp_path: Path) -> None:
    shard = write(tmp_path / "0.tar", [*sample(0), ("odd.cls", b"1"), ("odd.png", b"no image")])
    samples = load(shard)
    sentence = (
        rf"^{shard}: odd\.png cannot be read as an image \(it is none of JPEG, .*, GIF\); replace it or remove it"
    )
    with pytest.raises(UsageError, match=sentence):
        samples.images([0, 1])
    shard.unlink()
    with pytest.raises(UsageError, match=f"^{shard} cannot be read as a tar file"):
        samples.images([0])


@pytest.mark.parametrize(
    ("string", "sentence"),
    [
        ("webdataset:", r"'webdataset:' names no shards; write webdataset:PATH"),
        ("webdataset:0.tar", r"there is no file .*/0\.tar; write webdataset:PATH"),
        ("webdataset:{00..12}.tar", r"there is no file .*/00\.tar, nor 12 others of 13; write"),
        ("webdataset:.", r".* holds no \.tar file; write webdataset:PATH"),
        ("webdataset:{0..99999999999}.tar", r".* names more than 100,000 shards; write smaller ranges"),
        ("webdataset:{0..9}{0..99}{0..999}.tar", r".* names more than 100,000 shards; write smaller ranges"),
        ("webdataset:{0..{0..999999}}.tar", r".* names more than 100,000 shards"),
        (f"webdataset:{{0..{'9' * 200}}}.tar", r".* names more than 100,000 shards"),
        ("webdataset:{9..1}.tar", r"the range \{9\.\.1\} is empty; write its smaller number first"),
        (f"webdataset:{'a' * 5000}.tar", "the name 'a+.tar' is none that a file can have"),
        ("webdataset:a\0.tar", "the name '.*' is none that a file can have"),
        ("webdataset:/dev/zero", "/dev/zero is no ordinary file; write webdataset:PATH"),
        ("0.tar", r"'0\.tar' is a tar file by its name; write webdataset:0\.tar"),
    ],
)
def test_a_wrong_string_names_the_correct_form(
    string: str, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=f"^{sentence}"):
        load_data(string)


class Watched:
    """A slow source that notes what is read, and when."""

    slow: ClassVar[bool] = True

    def __init__(self) -> None:
        self.read_so_far: list[int] = []
        self.threads: set[str] = set()

    def read(self, rows: npt.NDArray[np.int64]) -> torch.Tensor:
        if rows[0] < 0:
            raise UsageError("no such row")
        self.threads.add(threading.current_thread().name)
        self.read_so_far.append(int(rows[0]))
        return torch.full((len(rows), 1, 2, 2), 0.5)

    def content(self, rows: npt.NDArray[np.int64]) -> Iterator[bytes]:
        yield rows.tobytes()

    def flags(self, rows: npt.NDArray[np.int64]) -> tuple[Flag, ...]:
        return ()


def blocks(count: int) -> list[npt.NDArray[np.int64]]:
    return [np.arange(2 * k, 2 * k + 2) for k in range(count)]


def test_the_next_block_is_read_while_one_is_used_and_no_more() -> None:
    source = Watched()
    samples = Samples("watched", np.zeros(40, np.int64), None, source, np.arange(40))
    found: Any = read_ahead(samples, blocks(20))
    for number in range(3):
        positions, x = next(found)
        assert positions.tolist() == [2 * number, 2 * number + 1]
        assert len(x) == 2
        until = time.monotonic() + 10
        while len(source.read_so_far) < number + 2 and time.monotonic() < until:
            time.sleep(0.001)
        time.sleep(0.01)
        assert source.read_so_far == [2 * k for k in range(number + 2)]
    assert threading.current_thread().name not in source.threads
    found.close()
    assert not any(thread.name.startswith("read-ahead") for thread in threading.enumerate())


def test_an_error_is_raised_at_its_block_after_the_blocks_before() -> None:
    samples = Samples("watched", np.zeros(8, np.int64), None, Watched(), np.array([0, 1, 2, 3, 4, 5, -1, -1]))
    found = read_ahead(samples, blocks(4))
    assert [next(found)[0][0] for _ in range(3)] == [0, 2, 4]
    with pytest.raises(UsageError, match="no such row"):
        next(found)
    assert list(read_ahead(samples, [])) == []


def test_arrays_in_memory_are_read_without_a_thread() -> None:
    samples = from_arrays(torch.rand(6, 1, 2, 2), torch.zeros(6, dtype=torch.int64))
    assert [x.shape[0] for _, x in read_ahead(samples, blocks(3))] == [2, 2, 2]
    assert not any(thread.name.startswith("read-ahead") for thread in threading.enumerate())
