"""The built-in digits: scikit-learn's 1,797 images of 8 x 8 pixels, in a split of our own."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from robustkit.data.request import DataRequest
from robustkit.data.samples import Samples
from robustkit.data.sources.arrays import array_samples

_TEST_SHARE = 0.2


def load(request: DataRequest) -> Samples:
    """Return the `train` or `test` split, shuffled, so that its first n are a random sample."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    labels = bunch.target.astype(np.int64)
    rows = _split(labels)[request.split]
    images = (bunch.images / 16).astype(np.float32)[:, None]
    classes = tuple(str(digit) for digit in range(10))
    return array_samples(images[rows], labels[rows], request.name, channels_last=False, classes=classes)


def _split(labels: npt.NDArray[np.int64]) -> dict[str, npt.NDArray[np.int64]]:
    """Draw a fifth of every class for the test; RandomState's numbers are frozen across NumPy versions."""
    rng = np.random.RandomState(0)
    test: list[npt.NDArray[np.int64]] = []
    train: list[npt.NDArray[np.int64]] = []
    for digit in range(10):
        members = rng.permutation(np.flatnonzero(labels == digit))
        cut = round(_TEST_SHARE * len(members))
        test.append(members[:cut])
        train.append(members[cut:])
    return {
        "test": rng.permutation(np.concatenate(test)),
        "train": rng.permutation(np.concatenate(train)),
    }
