"""Torchvision's small sets, from tiny files in their formats on disk."""

from __future__ import annotations

import io
import pickle
import struct
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import scipy.io
import torch
from torchvision import datasets

from robustkit.core.errors import UsageError
from robustkit.data import load_data

N = 4
LABELS = [3, 1, 0, 2]
RNG = np.random.RandomState(0)
COLOUR = RNG.randint(0, 256, (N, 3, 32, 32)).astype(np.uint8)
GREY = RNG.randint(0, 256, (N, 28, 28)).astype(np.uint8)


@pytest.fixture(autouse=True)
def any_checksum(monkeypatch: pytest.MonkeyPatch) -> None:
    """Accept our tiny files in place of the real ones."""
    for module in (datasets.cifar, datasets.svhn, datasets.mnist):
        monkeypatch.setattr(module, "check_integrity", lambda path, md5=None: Path(path).is_file())


def write_cifar(root: Path, hundred: bool) -> None:
    folder = root / ("cifar-100-python" if hundred else "cifar-10-batches-py")
    folder.mkdir(parents=True)
    parts = ["train", "test"] if hundred else ["test_batch", *(f"data_batch_{i}" for i in range(1, 6))]
    key = "fine_label" if hundred else "label"
    for part in parts:
        batch = {"data": COLOUR.reshape(N, -1), f"{key}s": LABELS}
        (folder / part).write_bytes(pickle.dumps(batch))
    names = {f"{key}_names": ["a", "b", "c", "d"]}
    (folder / ("meta" if hundred else "batches.meta")).write_bytes(pickle.dumps(names))


def write_mnist(root: Path, name: str) -> None:
    folder = root / name / "raw"
    folder.mkdir(parents=True)
    for part in ("train", "t10k"):
        head = struct.pack(">4B3I", 0, 0, 8, 3, *GREY.shape)
        (folder / f"{part}-images-idx3-ubyte").write_bytes(head + GREY.tobytes())
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">4BI", 0, 0, 8, 1, N) + bytes(LABELS))


def write_svhn(root: Path) -> None:
    root.mkdir(exist_ok=True)
    arrays = {"X": COLOUR.transpose(2, 3, 1, 0), "y": np.array([[3], [1], [10], [2]], np.uint8)}
    for part in ("train", "test"):
        scipy.io.savemat(root / f"{part}_32x32.mat", arrays)


def write_all(root: Path) -> None:
    write_cifar(root, hundred=False)
    write_cifar(root, hundred=True)
    write_mnist(root, "MNIST")
    write_mnist(root, "FashionMNIST")
    write_svhn(root)


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "mnist", "fashionmnist", "svhn"])
@pytest.mark.parametrize("split", ["test", "train", None])
def test_files_on_disk_are_read(
    name: str, split: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_all(tmp_path)
    monkeypatch.setenv("ROBUSTKIT_DATA", str(tmp_path))
    samples = load_data(f"{name}:{split}" if split else name)
    assert samples.name == f"{name}:{split or 'test'}"
    assert samples.labels[:N].tolist() == LABELS
    assert len(samples) == (5 * N if (name, split) == ("cifar10", "train") else N)
    raw = GREY[:, None] if "mnist" in name else COLOUR
    x = samples.images([2, 0])
    assert x.is_contiguous()
    assert torch.equal(x, torch.from_numpy(raw[[2, 0]]).float() / 255)
    assert len(samples.classes or ()) == (4 if "cifar" in name else 10)


def test_reading_writes_nothing(tmp_path: Path) -> None:
    write_all(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    for name in ("cifar10", "mnist", "svhn"):
        load_data(name, root=tmp_path)
    with pytest.raises(UsageError):
        load_data("cifar10", root=tmp_path / "absent")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "mnist", "fashionmnist", "svhn"])
def test_missing_files_name_their_folder_and_the_correct_form(name: str, tmp_path: Path) -> None:
    sentence = f"^{name}:test is not, or not whole, in {tmp_path}; add --download .*--data-root DIR"
    with pytest.raises(UsageError, match=sentence):
        load_data(name, root=tmp_path)


@pytest.mark.parametrize("size", [0, 3, 100])
@pytest.mark.parametrize("kind", ["images-idx3", "labels-idx1"])
def test_damaged_files_are_reported(kind: str, size: int, tmp_path: Path) -> None:
    write_all(tmp_path)
    path = tmp_path / "MNIST" / "raw" / f"t10k-{kind}-ubyte"
    path.write_bytes(path.read_bytes()[: min(size, path.stat().st_size - 1)])
    with pytest.raises(UsageError, match=f"^mnist:test is not, or not whole, in {tmp_path}"):
        load_data("mnist", root=tmp_path)


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "svhn"])
def test_a_wrong_checksum_is_reported(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_all(tmp_path)
    monkeypatch.undo()
    with pytest.raises(UsageError, match=f"^{name}:test is not, or not whole, in {tmp_path}"):
        load_data(name, root=tmp_path)


def test_download_uses_torchvision_and_keeps_stdout_clean(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fetch(self: Any) -> None:
        print("Downloading")
        write_cifar(Path(self.root), hundred=False)

    monkeypatch.setattr(datasets.CIFAR10, "download", fetch)
    assert len(load_data("cifar10", root=tmp_path / "new", download=True)) == N
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Downloading" in captured.err


@pytest.mark.parametrize("failure", [URLError("no route"), PermissionError(13, "denied"), RuntimeError("a:\nb")])
def test_a_failed_download_reports_the_reason(
    failure: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fetch(self: Any) -> None:
        raise failure

    monkeypatch.setattr(datasets.MNIST, "download", fetch)
    with pytest.raises(UsageError, match=rf"^mnist:test could not be downloaded to {tmp_path} \(.*\); check"):
        load_data("mnist", root=tmp_path, download=True)


def test_an_array_file_of_a_set_has_the_fingerprint_of_the_set(tmp_path: Path) -> None:
    write_all(tmp_path)
    file = tmp_path / "cifar10.npz"
    np.savez(file, x=COLOUR.transpose(0, 2, 3, 1), y=LABELS)
    assert load_data(str(file)).fingerprint == load_data("cifar10", root=tmp_path).fingerprint


def test_warnings_of_old_pickles_are_suppressed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_all(tmp_path)
    real = pickle.load

    def warn(file: io.BufferedReader, **words: Any) -> Any:
        import warnings

        warnings.warn("align should be passed as a boolean", stacklevel=1)
        return real(file, **words)

    monkeypatch.setattr(datasets.cifar.pickle, "load", warn)
    assert len(load_data("cifar10", root=tmp_path)) == N
