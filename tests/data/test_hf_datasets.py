"""Local folders of Parquet files read by the library datasets."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from robustkit.core.errors import UsageError
from robustkit.data import load_data

datasets = pytest.importorskip("datasets")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, np.ndarray]:
    """Write a data set of six pictures in two splits."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    pixels = np.random.default_rng(0).integers(0, 256, (6, 7, 5, 3), np.uint8)
    files = []
    for one in pixels:
        buffer = io.BytesIO()
        Image.fromarray(one).save(buffer, "PNG")
        files.append({"bytes": buffer.getvalue(), "path": None})
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    place = tmp_path / "my set"
    place.mkdir()
    for split, rows in (("train", slice(0, 2)), ("test", slice(2, 6))):
        labels = [0, 1, 1, 0, 1, 0][rows]
        table = datasets.Dataset.from_dict({"image": files[rows], "label": labels}, features=features)
        table.to_parquet(place / f"{split}-00000-of-00001.parquet")
    return place, pixels


def test_a_split_of_a_local_folder(folder: tuple[Path, np.ndarray]) -> None:
    place, pixels = folder
    samples = load_data(f"hf-data:{place}:test")
    assert samples.labels.tolist() == [1, 0, 1, 0]
    assert samples.classes == ("cat", "dog")
    expected = torch.from_numpy(pixels[[5, 2]]).permute(0, 3, 1, 2) / 255
    torch.testing.assert_close(samples.images([3, 0]), expected)
    assert len(load_data(f"hf-data:{place}:train")) == 2


def test_a_wrong_split_is_one_sentence(folder: tuple[Path, np.ndarray]) -> None:
    with pytest.raises(UsageError, match="could not be loaded"):
        load_data(f"hf-data:{folder[0]}:validation")
    with pytest.raises(UsageError, match="names no split"):
        load_data("hf-data:cifar10")
