"""The kinds of data that `--data` accepts. Imports no torch, so that `robustkit list data` is fast."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class DataEntry:
    """One kind of data.

    Attributes:
        name: the word before the colon.
        description: one line for `robustkit list data`.
        example: a data string that works as written, or with PATH replaced.
        splits: the splits that can be written after the colon; empty if there are none.
        default_split: the split used if none is written, or None.
        threat: the default threat, or None.
        num_classes: number of classes, or None if it depends on the files.
        input_shape: (C, H, W) in pixels, or None if images differ or it depends on the files.
        needs_root: whether the files are in `--data-root`.
    """

    name: str
    description: str
    example: str
    splits: tuple[str, ...] = ()
    default_split: str | None = None
    threat: str | None = None
    num_classes: int | None = None
    input_shape: tuple[int, int, int] | None = None
    needs_root: bool = False


def _named(
    name: str,
    description: str,
    threat: str,
    num_classes: int,
    input_shape: tuple[int, int, int] | None,
    splits: tuple[str, str] = ("test", "train"),
    needs_root: bool = True,
) -> DataEntry:
    """Return the entry of a data set whose first split is the default."""
    return DataEntry(
        name=name,
        description=description,
        example=f"{name}:{splits[0]}",
        splits=splits,
        default_split=splits[0],
        threat=threat,
        num_classes=num_classes,
        input_shape=input_shape,
        needs_root=needs_root,
    )


CATALOG: dict[str, DataEntry] = {
    entry.name: entry
    for entry in (
        _named(
            "digits",
            "scikit-learn's handwritten digits, built in",
            "linf:0.15",
            10,
            (1, 8, 8),
            needs_root=False,
        ),
        _named("mnist", "MNIST handwritten digits", "linf:0.3", 10, (1, 28, 28)),
        _named("fashionmnist", "Fashion-MNIST clothes", "linf:0.1", 10, (1, 28, 28)),
        _named("cifar10", "CIFAR-10 small photographs", "linf:8/255", 10, (3, 32, 32)),
        _named("cifar100", "CIFAR-100 small photographs", "linf:8/255", 100, (3, 32, 32)),
        _named("svhn", "SVHN house numbers", "linf:8/255", 10, (3, 32, 32)),
        _named(
            "imagenet",
            "ImageNet-1k, class folders of images",
            "linf:4/255",
            1000,
            None,
            splits=("val", "train"),
        ),
        DataEntry(
            "folder",
            "your images, one folder per class; ?classes=FILE for the model's order of them",
            "folder:PATH",
        ),
        DataEntry(
            "webdataset", "your images in tar shards, each KEY.jpg or such with its KEY.cls", "webdataset:PATH"
        ),
        DataEntry(
            "npz",
            "your arrays: x (images), y (labels), optionally classes (names); ?layout=NCHW or NHWC",
            "PATH.npz",
        ),
    )
}
