"""Samples of `.npz` files: what is accepted, how it is read, and every refusal."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from robustkit.core.errors import UsageError
from robustkit.data import load_data
from robustkit.data.sources import archive as module

B, C, H, W = 5, 3, 7, 9
X = np.random.RandomState(0).randint(0, 256, (B, H, W, C)).astype(np.uint8)
F = np.random.RandomState(0).random_sample((B, C, H, W)).astype(np.float32)
Y = np.array([0, 2, 1, 2, 0])


def written(path: Path, save: Callable[..., None] = np.savez, **arrays: Any) -> Path:
    save(path, **arrays)
    return path


@pytest.fixture
def mapped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Map arrays of any size, as large ones are."""
    monkeypatch.setattr(module, "_MAP_FROM", 0)


@settings(max_examples=60, deadline=None)
@given(
    data=st.data(),
    last=st.booleans(),
    packed=st.booleans(),
    fortran=st.booleans(),
    threshold=st.sampled_from([0, 1 << 20]),
)
def test_round_trip(data: st.DataObject, last: bool, packed: bool, fortran: bool, threshold: int) -> None:
    n, c, h, w = (data.draw(st.integers(1, top)) for top in (4, 4, 6, 6))
    kind: Any = np.uint8 if last else data.draw(st.sampled_from([np.float16, np.float32, np.float64]))
    shape = (n, h, w, c) if last else (n, c, h, w)
    elements = None if last else st.floats(0, 1, width=16)
    x = data.draw(hnp.arrays(kind, shape, elements=elements))
    y = data.draw(
        hnp.arrays(np.dtype(data.draw(st.sampled_from(["int64", "uint8", ">i4"]))), n, elements=st.integers(0, 9))
    )
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_MAP_FROM", threshold)
        save = np.savez_compressed if packed else np.savez
        path = written(Path(folder, "set.npz"), save, x=np.asfortranarray(x) if fortran else x, y=y)
        samples = load_data(str(path))
        expected = (x.astype(np.float32) / 255).transpose(0, 3, 1, 2) if last else x.astype(np.float32)
        assert np.array_equal(samples.images(range(n)).numpy(), expected)
        assert np.array_equal(samples.labels, y)
        assert samples.labels.dtype == np.int64


def test_name_is_the_absolute_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path / "set.npz", x=X, y=Y, classes=np.array(["cat", "dog", "frög"]))
    monkeypatch.chdir(tmp_path)
    samples = load_data("./set.npz")
    assert samples.name == str(path)
    assert samples.classes == ("cat", "dog", "frög")


def test_large_arrays_are_mapped_and_read_in_part(tmp_path: Path, mapped: None) -> None:
    path = written(tmp_path / "set.npz", x=X, y=Y)
    samples = load_data(str(path))
    assert isinstance(samples.source.array, np.memmap)  # type: ignore[attr-defined]
    assert not samples.source.array.flags.writeable  # type: ignore[attr-defined]
    assert torch.equal(samples.images([3, 1]), torch.from_numpy(X[[3, 1]] / np.float32(255)).permute(0, 3, 1, 2))
    # A change on disk shows: the bytes were not read when the file was opened.
    raw = bytearray(path.read_bytes())
    raw[raw.index(X.tobytes()) + X[0].size] ^= 255
    path.write_bytes(raw)
    assert samples.images([1])[0, 0, 0, 0] == np.float32(X[1, 0, 0, 0] ^ 255) / np.float32(255)


def test_fingerprint_is_the_same_mapped_packed_and_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "b").mkdir()
    plain = load_data(str(written(tmp_path / "set.npz", x=X, y=Y))).fingerprint
    packed = load_data(str(written(tmp_path / "b" / "set.npz", np.savez_compressed, x=X, y=Y))).fingerprint
    monkeypatch.setattr(module, "_MAP_FROM", 0)
    mapped = load_data(str(tmp_path / "set.npz")).fingerprint
    assert plain == packed == mapped
    changed = X.copy()
    changed[-1, -1, -1, -1] ^= 1
    assert load_data(str(written(tmp_path / "set.npz", x=changed, y=Y))).fingerprint != plain


def test_values_are_judged_when_read(tmp_path: Path) -> None:
    wrong = F.copy()
    wrong[2, 0, 0, 0] = 1.5
    samples = load_data(str(written(tmp_path / "set.npz", x=wrong, y=Y)))
    assert samples.head(2).images([0, 1]).shape == (2, C, H, W)
    with pytest.raises(UsageError, match=r"set\.npz: the image at position 2 has values from .* to 1\.5"):
        samples.images([1, 2])


@pytest.mark.parametrize(
    ("arrays", "sentence"),
    [
        ({"x": X}, "has no 'y', it has x; write x"),
        ({"y": Y}, "has no 'x', it has y; write x"),
        ({"images": X, "labels": Y}, "has no 'x', it has images, labels; write x"),
        ({}, "has no 'x', it has nothing; write x"),
        ({"x": X.astype(object), "y": Y}, "'x' holds pickled Python objects, which are never read"),
        ({"x": X, "y": Y.astype(object)}, "'y' holds pickled Python objects"),
        (
            {"x": X, "y": Y, "classes": np.array(["a", "b", "c"], object)},
            "'classes' holds pickled Python objects",
        ),
        ({"x": X, "y": Y, "classes": np.arange(3)}, r"'classes' is int64 of shape \(3,\); write one string"),
        ({"x": X, "y": Y, "classes": np.array("abc")}, r"'classes' is <U3 of shape \(\); write one string"),
        (
            {"x": X, "y": Y, "classes": np.array(["a", "b"])},
            "position 1 is 2, but there are 2 class names; .* 0 to 1",
        ),
        ({"x": X.astype(np.int32), "y": Y}, "the images x are int32; write uint8"),
        ({"x": X[0], "y": Y}, r"have shape \(7, 9, 3\); a channel axis is missing"),
        (
            {"x": X.transpose(0, 3, 1, 2), "y": Y},
            r"the uint8 images x have shape \(5, 3, 7, 9\), which read as \(N, H, W, C\) means 9 channels "
            r"of 3 x 7 pixels; write set\.npz\?layout=NCHW, or set\.npz\?layout=NHWC if",
        ),
        (
            {"x": F.transpose(0, 2, 3, 1), "y": Y},
            r"float32 images x have shape \(5, 7, 9, 3\), which read as \(N, C",
        ),
        ({"x": X, "y": Y[1:]}, "5 images x but 4 labels y"),
        ({"x": X[:0], "y": Y[:0]}, "holds no pixel"),
        ({"x": X, "y": Y / 4}, r"the label at position 1 is 0\.5; write whole numbers from 0 up"),
        ({"x": X, "y": Y.astype("M8[s]")}, r"the labels y are datetime64\[s\]; write integers"),
        ({"x": X, "y": np.eye(5) / 2}, r"the labels y have shape \(5, 5\), but row 0 is not one-hot"),
        ({"x": X, "y": Y - 1}, "the label at position 0 is -1"),
    ],
)
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_wrong_content_says_what_to_write(
    arrays: dict[str, Any], sentence: str, save: Callable[..., None], tmp_path: Path
) -> None:
    path = written(tmp_path / "set.npz", save, **arrays)
    with pytest.raises(UsageError, match=f"^{path}:? .*{sentence}"):
        load_data(str(path))


def plain_npz() -> bytes:
    file = io.BytesIO()
    np.savez(file, x=X, y=Y)
    return file.getvalue()


def member_npz(member: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("x.npy", member)
        archive.writestr("y.npy", b"")
    return file.getvalue()


def npy(x: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, x)
    return file.getvalue()


def flipped() -> bytes:
    raw = bytearray(plain_npz())
    raw[raw.index(X.tobytes()) + 3] ^= 1
    return bytes(raw)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "is empty; write it again with numpy.savez"),
        (b"P", "is not an .npz archive; write it with numpy.savez"),
        (b"hello, world" * 99, "is not an .npz archive"),
        (npy(X), "is not an .npz archive"),
        (pickle.dumps({"x": 1}), "is not an .npz archive"),
        (plain_npz()[:500], "is truncated or damaged"),
        (plain_npz()[:-30], "is truncated or damaged"),
        (flipped(), "is truncated or damaged"),
        (member_npz(b""), "is truncated or damaged"),
        (member_npz(b"not an array"), "is truncated or damaged"),
        (member_npz(npy(X)[:-1]), "is truncated or damaged"),
        (member_npz(npy(X).replace(b"(5,", b"(9,")), "is truncated or damaged"),
        (member_npz(npy(X).replace(b"(5,", b"(((")), "is truncated or damaged"),
        (member_npz(npy(X).replace(b"NUMPY\x01", b"NUMPY\x07")), "is truncated or damaged"),
    ],
)
def test_a_file_that_does_not_match_its_format_is_refused(content: bytes, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "set.npz"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=f"^{path} {sentence}"):
        load_data(str(path))


@settings(max_examples=150, deadline=None)
@given(data=st.data(), packed=st.booleans(), threshold=st.sampled_from([0, 1 << 20]))
def test_damage_never_ends_in_another_error(data: st.DataObject, packed: bool, threshold: int) -> None:
    file = io.BytesIO()
    (np.savez_compressed if packed else np.savez)(file, x=X[:2, :2, :2], y=Y[:2])
    raw = bytearray(file.getvalue())
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_MAP_FROM", threshold)
        path = Path(folder, "set.npz")
        path.write_bytes(raw)
        with contextlib.suppress(UsageError):
            samples = load_data(str(path))
            samples.images(range(len(samples)))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"^there is no file /.*/set\.npz; write the path of an \.npz file"):
        load_data(str(tmp_path / "set.npz"))


def test_a_folder_that_looks_like_a_file(tmp_path: Path) -> None:
    path = tmp_path / "set.npz"
    path.mkdir()
    with pytest.raises(UsageError, match=f"^{path} is a folder, not an .npz file; write folder:{path}"):
        load_data(str(path))


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path / "set.npz", x=X, y=Y)

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("robustkit.data.sources.archive.zipfile.ZipFile", refuse)
    with pytest.raises(UsageError, match=r"cannot be read \(Permission denied\); check"):
        load_data(str(path))


def bomb(path: Path, labels: int, method: int = zipfile.ZIP_DEFLATED) -> Path:
    """An archive of a few kB whose images take 12 MB."""
    with zipfile.ZipFile(path, "w", method) as archive:
        with archive.open("x.npy", "w") as file:
            head = {"descr": "|u1", "fortran_order": False, "shape": (1000, 64, 64, 3)}
            np.lib.format.write_array_header_1_0(file, head)
            file.write(bytes(1000 * 64 * 64 * 3))
        with archive.open("y.npy", "w") as file:
            np.lib.format.write_array(file, np.zeros(labels, np.int64))
    return path


def test_nothing_is_unpacked_before_the_headers_agree_and_it_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(load_data(str(bomb(tmp_path / "ok.npz", 1000)))) == 1000
    monkeypatch.setattr(module, "free_memory", lambda: 20 << 20)
    with pytest.raises(UsageError, match=r"'x' takes 0\.0 GiB unpacked, more than half of the free memory"):
        load_data(str(tmp_path / "ok.npz"))
    with pytest.raises(UsageError, match="1000 images x but 4 labels y"):
        load_data(str(bomb(tmp_path / "bomb.npz", 4)))
    with pytest.raises(UsageError, match="'x' is packed by method 12; write it with numpy"):
        load_data(str(bomb(tmp_path / "bz2.npz", 1000, zipfile.ZIP_BZIP2)))
    monkeypatch.undo()
    written(tmp_path / "names.npz", np.savez_compressed, x=X, y=Y, classes=np.full(3, "a" * 2_000_000))
    with pytest.raises(UsageError, match="'classes' takes 24,000,000 bytes, more than the 16,777,216 that"):
        load_data(str(tmp_path / "names.npz"))


def test_what_is_no_ordinary_file_is_never_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.npz")
    (tmp_path / "zero.npz").symlink_to("/dev/zero")
    for name, what in (("pipe", "a named pipe"), ("zero", "a device")):
        with pytest.raises(UsageError, match=rf"{name}\.npz cannot be read \(it is {what}, not an ordinary"):
            load_data(str(tmp_path / f"{name}.npz"))


def test_labels_may_be_one_hot_whole_floats_or_names(tmp_path: Path) -> None:
    for y in (np.eye(3)[Y], Y.astype(float), Y[:, None], Y.astype(np.uint8)):
        assert load_data(str(written(tmp_path / "set.npz", x=X, y=y))).labels.tolist() == Y.tolist()
    names = np.array(["cow", "ape", "bee"])
    samples = load_data(str(written(tmp_path / "set.npz", x=X, y=names[Y])))
    assert samples.labels.tolist() == [2, 1, 0, 1, 2]
    samples = load_data(str(written(tmp_path / "set.npz", x=X, y=names[Y], classes=names)))
    assert samples.labels.tolist() == Y.tolist()


def test_layout_can_be_set(tmp_path: Path) -> None:
    x = np.random.RandomState(0).randint(0, 256, (B, 13, 8, 8)).astype(np.uint8)
    path = written(tmp_path / "bands.npz", x=x, y=Y)
    with pytest.raises(UsageError, match=r"8 channels of 13 x 8 pixels; write bands\.npz\?layout=NCHW, or bands"):
        load_data(str(path))
    samples = load_data(f"{path}?layout=NCHW")
    assert samples.name == f"{path}?layout=NCHW"
    assert np.array_equal(samples.images([3])[0].numpy(), x[3].astype(np.float32) / np.float32(255))
    assert load_data(f"{path}?layout=NHWC").images([0]).shape == (1, 8, 13, 8)
    with pytest.raises(UsageError, match=r"no layout 'NWHC'\. Did you mean 'NHWC'\?"):
        load_data(f"{path}?layout=NWHC")
    with pytest.raises(UsageError, match=r"has a layout=, which only \.npz arrays need"):
        load_data("digits:test?layout=NCHW")
