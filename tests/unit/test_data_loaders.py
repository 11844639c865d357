"""A data loader or a dataset as data: what is read, how often, and what an item that is no pair says."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from robustkit.data import loaders
from robustkit.data.loaders import from_dataset, is_dataset
from robustkit.errors import UsageError

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
def test_bytes_may_stand_either_way(make: Any) -> None:
    expected = torch.from_numpy(BYTES.astype(np.float32)).permute(0, 3, 1, 2) / 255
    assert torch.equal(from_dataset(Items(make)).images(range(B)), expected)


def test_grey_pictures_have_one_channel() -> None:
    data = Items(lambda number: (Image.fromarray(BYTES[number]).convert("L"), int(Y[number])))
    assert from_dataset(data).images([0]).shape == (1, 1, H, W)


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
