"""Image files listed in CSV and JSONL."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from robustkit.core.errors import UsageError
from robustkit.data import load_data


@pytest.fixture
def pictures(tmp_path: Path) -> np.ndarray:
    """Write four pictures below tmp_path/a b; return their pixels."""
    folder = tmp_path / "a b"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 5, 3), np.uint8)
    for number, one in enumerate(pixels):
        Image.fromarray(one).save(folder / f"{number}.png")
    return pixels


LISTS = {
    "csv with a header": ("l.csv", "label,path\n2,a b/0.png\n0,a b/1.png\n1,a b/3.png\n"),
    "csv without": ("l.csv", "a b/0.png,2\na b/1.png,0\n\na b/3.png,1\n"),
    "jsonl": (
        "l.jsonl",
        "\n".join(json.dumps({"file": f"a b/{i}.png", "label": y}) for i, y in ((0, 2), (1, 0), (3, 1))),
    ),
}


@pytest.mark.parametrize("name", LISTS)
def test_a_list_gives_its_files_in_order(name: str, pictures: np.ndarray, tmp_path: Path) -> None:
    file, text = LISTS[name]
    (tmp_path / file).write_text(text)
    samples = load_data(str(tmp_path / file))
    assert samples.labels.tolist() == [2, 0, 1]
    assert samples.classes is None
    expected = torch.from_numpy(pictures[[0, 1, 3]]).permute(0, 3, 1, 2) / 255
    torch.testing.assert_close(samples.images([0, 1, 2]), expected)


def test_names_are_numbered_as_they_sort_or_by_classes(pictures: np.ndarray, tmp_path: Path) -> None:
    path = tmp_path / "l.csv"
    path.write_text("filename,class\na b/0.png,dog\na b/1.png,cat\n")
    samples = load_data(str(path))
    assert samples.classes == ("cat", "dog")
    assert samples.labels.tolist() == [1, 0]
    assert load_data(f"{path}?classes=dog,cat").labels.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("file", "text", "sentence"),
    [
        ("l.csv", "", "lists no image"),
        ("l.csv", "a,b,c\n1,2,3\n", "has the columns a, b, c"),
        ("l.csv", "path,label\na b/0.png\n", "line 2 has 1 columns"),
        ("l.csv", "a b/9.png,1\n", "no such file"),
        ("l.csv", "a b/0.png,1.5\na b/1.png,dog\n", None),
        ("l.jsonl", "{", "line 1 is no JSON"),
        ("l.jsonl", '{"path": "a b/0.png"}', "has no path and label"),
        ("l.jsonl", '{"path": "a b/0.png", "label": [1]}', "needs a path as text"),
        ("l.csv", b"\xff\xfe\x00", "no text in UTF-8"),
    ],
)
def test_a_wrong_list_is_one_sentence(
    file: str, text: str | bytes, sentence: str | None, pictures: np.ndarray, tmp_path: Path
) -> None:
    (tmp_path / file).write_bytes(text if isinstance(text, bytes) else text.encode())
    if sentence is None:
        assert load_data(str(tmp_path / file)).classes == ("1.5", "dog")
        return
    with pytest.raises(UsageError, match=sentence):
        load_data(str(tmp_path / file))


def test_an_absent_list_and_a_layout_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        load_data(str(tmp_path / "none.csv"))
    with pytest.raises(UsageError, match="layout="):
        load_data(f"{tmp_path / 'none.csv'}?layout=NCHW")
    with pytest.raises(UsageError, match="names no file"):
        load_data("list")
