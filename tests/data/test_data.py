"""Data strings, the catalog, and the built-in digits."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from robustkit.core.errors import UsageError
from robustkit.data import Samples, from_arrays, load_data
from robustkit.data.catalog import CATALOG
from robustkit.data.load import FILES
from robustkit.data.request import default_root


def test_digits_splits_are_disjoint_complete_and_stratified() -> None:
    test, train = load_data("digits:test"), load_data("digits:train")
    assert len(test) + len(train) == 1797
    rows = [image.tobytes() for image in (load_digits().images / 16).astype(np.float32)]
    read = [image.numpy().tobytes() for part in (test, train) for image in part.images(range(len(part)))]
    assert sorted(rows) == sorted(read)
    share = np.bincount(test.labels) / (np.bincount(test.labels) + np.bincount(train.labels))
    assert np.all(abs(share - 0.2) < 0.005)


def test_digits_are_the_same_forever() -> None:
    # Trained weights inside the installation rest on this very split.
    assert load_data("digits:test").labels[:8].tolist() == [9, 7, 9, 0, 3, 4, 9, 5]
    assert load_data("digits:train").labels[:8].tolist() == [3, 3, 7, 8, 4, 2, 9, 6]
    assert load_data("digits").fingerprint.startswith("a6edfe5ad3f4545e")


def test_digits_are_images_with_their_labels() -> None:
    samples = load_data("digits")
    assert samples.name == "digits:test"
    assert samples.classes == tuple("0123456789")
    assert samples.labels.dtype == np.int64
    x = samples.images([5, 0, 5])
    assert x.dtype == torch.float32
    assert x.shape == (3, 1, 8, 8)
    assert x.is_contiguous()
    assert torch.equal(x[0], x[2])
    bunch = load_digits()
    (row,) = np.flatnonzero((bunch.images / 16 == x[1, 0].numpy()).all((1, 2)))
    assert bunch.target[row] == samples.labels[0]


def test_the_first_digits_are_of_all_classes() -> None:
    for split in ("test", "train"):
        assert np.bincount(load_data(f"digits:{split}").labels[:100], minlength=10).min() >= 3


@pytest.mark.parametrize(
    ("string", "sentence"),
    [
        ("digit", r"no data 'digit'\. Did you mean 'digits'\? Known: cifar-c, cifar10, .*npz, svhn, webdataset\."),
        ("digits:tset", r"no split of digits 'tset'\. Did you mean 'test'\? Known: test, train\."),
        ("digits:", r"no split of digits ''\. Known: test, train\."),
        ("imagenet:test", r"no split of imagenet 'test'\..* Known: train, val\."),
        ("", r"no data ''\."),
        (
            "set.npz:test",
            r"'set\.npz:test' names the split 'test', but an \.npz file has none; write set\.npz\.",
        ),
        ("npz", r"'npz' names no file; write a path that ends in \.npz"),
        ("npz:test", r"'npz:test' names no file; write a path that ends in \.npz"),
        ("folder", r"'folder:' names no folder; write folder:PATH"),
        ("folder:", r"'folder:' names no folder; write folder:PATH"),
        ("pictures", r"'pictures' is a folder; write folder:pictures if"),
        ("pictures/", r"'pictures/' is a folder; write folder:pictures/ if"),
        ("images.npy", r"'images\.npy' is not an \.npz file; write folder:PATH, or a path"),
    ],
)
def test_a_wrong_string_names_the_correct_form(
    string: str, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()
    (tmp_path / "images.npy").touch()
    with pytest.raises(UsageError, match=f"^{sentence}"):
        load_data(string)


def test_a_known_name_wins_over_a_folder_of_that_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").mkdir()
    assert load_data("digits").name == "digits:test"


def test_the_root_is_the_environments_then_the_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.delenv("ROBUSTKIT_DATA", raising=False)
    assert default_root() == Path("/home/someone/.cache/robustkit/data")
    monkeypatch.setenv("ROBUSTKIT_DATA", "~/sets/../data")
    assert default_root() == Path("/home/someone/data")


def test_catalog_is_consistent() -> None:
    for name, entry in CATALOG.items():
        assert entry.name == name
        assert entry.description
        assert entry.default_split in (*entry.splits, None)
        assert (entry.default_split is None) == (not entry.splits)
        assert entry.example.startswith(name) or name in FILES.values()
    digits = CATALOG["digits"]
    x = load_data(digits.example).images([0])
    assert tuple(x.shape[1:]) == digits.input_shape


def test_the_catalog_imports_no_torch() -> None:
    code = (
        "import sys, robustkit.data, robustkit.data.catalog, robustkit.core.preprocess;"
        "bad = {'torch', 'torchvision', 'numpy', 'sklearn', 'PIL'} & set(sys.modules);"
        "assert not bad, bad"
    )
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(root)})


def test_the_package_offers_its_three_names_only() -> None:
    import robustkit.data

    assert robustkit.data.Samples is Samples
    with pytest.raises(AttributeError, match="no attribute 'load_dta'"):
        robustkit.data.load_dta  # noqa: B018


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([(np.zeros((1, 8, 8)), 1), (np.zeros((1, 8, 8)), 2)], "the images x are no array"),
        (torch.eye(4).to_sparse(), "a tensor of layout torch.sparse_coo on the device cpu cannot be read"),
        (torch.zeros(2, 1, 8, 8).to("meta"), "on the device meta cannot be read"),
    ],
)
def test_values_that_are_no_array_are_refused(images: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        from_arrays(images, [1, 2])
