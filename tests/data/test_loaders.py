"""A data loader or a dataset as data: what is read, how often, and what an item that is no pair says."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from robustkit.core.errors import UsageError
from robustkit.data import from_arrays
from robustkit.data.sources import loaders
from robustkit.data.sources.loaders import from_dataset, is_dataset

B, C, H, W = 5, 3, 7, 9
X = torch.rand(B, C, H, W)
Y = torch.tensor([0, 2, 1, 2, 0])
BYTES = (X.permute(0, 2, 3, 1) * 255).byte().numpy()


class Items(Dataset[Any]):
    """Items made by a function of their number, and how often each was read."""

    classes = ("ape", "bee", "cow")

    def __init__(self, make: Any) -> None:
        self.make, self.read = make, 0

    def __len__(self) -> int:
        return B

    def __getitem__(self, number: int) -> Any:
        self.read += 1
        return self.make(number)


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return ((X[number], Y[number]) for number in range(B))


@pytest.mark.parametrize(
    "data",
    [
        TensorDataset(X, Y),
        DataLoader(TensorDataset(X, Y), batch_size=2),
        [(X[number], int(Y[number])) for number in range(B)],
        Stream(),
        DataLoader(Stream(), batch_size=2),
        DataLoader(TensorDataset(X, Y), batch_size=None),
        [(X[:2], Y[:2]), (X[2:], Y[2:])],
        (X, Y),
        {"x": X.numpy(), "y": Y.numpy()},
        iter(DataLoader(TensorDataset(X, Y), batch_size=2)),
        ((X[number], Y[number]) for number in range(B)),
        Items(lambda number: {"pixel_values": X[number], "label": int(Y[number]), "path": "a"}),
        Items(lambda number: (X[number], torch.nn.functional.one_hot(Y[number], 3), number)),
        Items(lambda number: (X[number].numpy(), ["ape", "bee", "cow"][Y[number]])),
        DataLoader(Items(lambda number: (X[number], ["ape", "bee", "cow"][Y[number]])), batch_size=2),
    ],
)
def test_images_and_labels_are_those_of_the_dataset(data: Any) -> None:
    assert is_dataset(data)
    samples = from_dataset(data)
    assert torch.equal(samples.images(range(B)), X)
    assert samples.labels.tolist() == Y.tolist()


@pytest.mark.parametrize(
    "make",
    [
        lambda number: (Image.fromarray(BYTES[number]), int(Y[number])),
        lambda number: (BYTES[number], int(Y[number])),
        lambda number: (torch.from_numpy(BYTES[number]).permute(2, 0, 1), int(Y[number])),
    ],
)
def test_bytes_of_either_layout_are_read(make: Any) -> None:
    expected = torch.from_numpy(BYTES.astype(np.float32)).permute(0, 3, 1, 2) / 255
    assert torch.equal(from_dataset(Items(make)).images(range(B)), expected)


def test_grey_pictures_have_one_channel() -> None:
    data = Items(lambda number: (Image.fromarray(BYTES[number]).convert("L"), int(Y[number])))
    assert from_dataset(data).images([0]).shape == (1, 1, H, W)


@pytest.mark.parametrize(("mode", "channels"), [("LA", 1), ("1", 1), ("RGBA", 3), ("P", 3)])
def test_pictures_of_at_most_8_bits_are_grey_or_in_colour(mode: str, channels: int) -> None:
    data = Items(lambda number: (Image.fromarray(BYTES[number]).convert(mode), int(Y[number])))
    assert from_dataset(data).images([0]).shape == (1, channels, H, W)


@pytest.mark.parametrize("mode", ["I", "F", "I;16"])
def test_pictures_of_more_bits_are_refused(mode: str) -> None:
    data = Items(lambda number: (Image.fromarray(BYTES[number]).convert("L").convert(mode), int(Y[number])))
    with pytest.raises(
        UsageError, match=rf"item 0 has more than 8 bits per pixel \(mode {mode}\); pass its numbers"
    ):
        from_dataset(data)


@pytest.mark.parametrize("labels", [3, Y[:2], None])
def test_a_batch_has_as_many_labels_as_images(labels: Any) -> None:
    with pytest.raises(UsageError, match="batch 0 of 5 images has other than 5 labels"):
        from_dataset([(X, labels)])


@pytest.mark.parametrize("tensor", [X.to_sparse(), X.to("meta")])
def test_tensors_without_numbers_are_refused(tensor: torch.Tensor) -> None:
    for data in ((tensor, Y), (X, tensor)):
        with pytest.raises(UsageError, match="cannot be read; pass a dense one that holds its numbers"):
            from_dataset(data) if data[0] is tensor else from_arrays(*data)


def test_every_item_is_read_once_and_names_come_through_a_subset() -> None:
    data = Items(lambda number: (torch.rand(C, H, W), int(Y[number])))
    samples = from_dataset(Subset(data, [0, 1, 2]))
    assert torch.equal(samples.images([0]), samples.images([0]))
    assert data.read == 3
    assert samples.classes == ("ape", "bee", "cow")


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda number: X[number], "item 0 is a Tensor; return"),
        (
            lambda number: {"picture": X[number], "label": 1},
            "item 0 has the keys picture, label; call them",
        ),
        (
            lambda number: (X[number, :, : 7 - number % 2], 1),
            r"item 1 has float32 images of shape \(3, 6, 9\)",
        ),
        (lambda number: (X[number], [1, 0, 0.5][number % 3]), r"position 2 is 0\.5; write whole numbers"),
        (lambda number: 1 // (number - 3), "reading item 0 failed with|item 0 is a int"),
        (lambda number: (X[3 + number], 1), "reading item 2 failed with IndexError: index 5 is out of bounds"),
    ],
)
def test_an_item_that_is_no_pair_is_named(make: Any, sentence: str) -> None:
    with pytest.raises(UsageError, match=f"^python:Items: .*({sentence})"):
        from_dataset(Items(make))


def test_endless_data_ends_at_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    class Endless(IterableDataset[Any]):
        def __iter__(self) -> Any:
            while True:
                yield X[0], 1

    monkeypatch.setattr(loaders, "free_memory", lambda: 10 * X[0].nbytes)
    with pytest.raises(UsageError, match="6 of its images take more than half of the free memory"):
        from_dataset(Endless())
    assert not is_dataset(X)
    assert not is_dataset(BYTES)
