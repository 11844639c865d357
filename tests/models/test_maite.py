"""Models and data sets of MAITE's protocols, which need no import of maite."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch

import robustkit
from robustkit.models import as_classifier

NAMES = tuple(f"digit {number}" for number in range(10))


class Model:
    """A MAITE classifier around the built-in net."""

    metadata: ClassVar[dict[str, Any]] = {
        "id": "digits",
        "index2label": {number: str(number) for number in range(10)},
    }

    def __init__(self, arrays: bool) -> None:
        self.net, self.arrays = robustkit.load_model("robustkit:digits-cnn"), arrays

    def __call__(self, batch: Any) -> Any:
        assert isinstance(batch, list)
        rows = self.net(torch.stack([torch.as_tensor(one) for one in batch]))
        return [row.detach().numpy() for row in rows] if self.arrays else list(rows)


class Data:
    """A MAITE data set: images, one-hot targets and metadata of each."""

    metadata: ClassVar[dict[str, Any]] = {
        "id": "digits",
        "index2label": {number: f"digit {number}" for number in range(10)},
    }

    def __init__(self, n: int) -> None:
        self.samples = robustkit.load_data("digits:test").head(n)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, position: int) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
        image = self.samples.images([position])[0].numpy()
        return image, np.eye(10)[self.samples.labels[position]], {"id": position}


def test_a_maite_classifier_and_data_set_are_taken_as_they_are() -> None:
    data, net = Data(6), robustkit.load_model("robustkit:digits-cnn")
    x = data.samples.images(range(6))
    for arrays in (False, True):
        model = as_classifier(Model(arrays))
        assert model.num_classes == 10
        torch.testing.assert_close(model(x), net(x))
    with torch.enable_grad():
        point = x.requires_grad_()
        assert torch.autograd.grad(as_classifier(Model(False))(point).sum(), point)[0].abs().sum() > 0
    record = robustkit.corrupt(Model(False), data, corruptions=["contrast"], severities=[1])
    assert record.clean is not None
    assert record.clean.value == float((net(x.detach()).argmax(1).numpy() == data.samples.labels).mean())


def test_the_names_of_its_classes_are_kept() -> None:
    from robustkit.data.sources.loaders import from_dataset

    assert from_dataset(Data(3)).classes == NAMES
