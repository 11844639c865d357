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
        load: the function that reads it, as `module:function`; called with a `robustkit.data.request.DataRequest`.
        reader: the class of torchvision.datasets that reads it, for `torchvision_sets:small_set`.
        is_path: whether the part after the colon is a path.
        is_pictures: whether these are image files, read at the model's input size.
    """

    name: str
    description: str
    example: str
    load: str
    splits: tuple[str, ...] = ()
    default_split: str | None = None
    threat: str | None = None
    num_classes: int | None = None
    input_shape: tuple[int, int, int] | None = None
    reader: str = ""
    is_path: bool = False
    is_pictures: bool = False


_SOURCES = "robustkit.data.sources"


def _named(
    name: str,
    description: str,
    threat: str,
    num_classes: int,
    input_shape: tuple[int, int, int] | None,
    splits: tuple[str, str] = ("test", "train"),
    load: str = "",
    **more: str | bool,
) -> DataEntry:
    """Return the entry of a data set whose first split is the default."""
    return DataEntry(
        name=name,
        description=description,
        example=f"{name}:{splits[0]}",
        load=load or f"{_SOURCES}.torchvision_sets:small_set",
        splits=splits,
        default_split=splits[0],
        threat=threat,
        num_classes=num_classes,
        input_shape=input_shape,
        **more,  # type: ignore[arg-type]
    )


_ENTRIES = (
    _named(
        "digits",
        "scikit-learn's handwritten digits, built in",
        "linf:0.15",
        10,
        (1, 8, 8),
        load=f"{_SOURCES}.digits:load",
    ),
    _named("mnist", "MNIST handwritten digits", "linf:0.3", 10, (1, 28, 28), reader="MNIST"),
    _named("fashionmnist", "Fashion-MNIST clothes", "linf:0.1", 10, (1, 28, 28), reader="FashionMNIST"),
    _named("cifar10", "CIFAR-10 small photographs", "linf:8/255", 10, (3, 32, 32), reader="CIFAR10"),
    _named("cifar100", "CIFAR-100 small photographs", "linf:8/255", 100, (3, 32, 32), reader="CIFAR100"),
    _named("svhn", "SVHN house numbers", "linf:8/255", 10, (3, 32, 32), reader="SVHN"),
    _named(
        "imagenet",
        "ImageNet-1k, class folders of images",
        "linf:4/255",
        1000,
        None,
        splits=("val", "train"),
        load=f"{_SOURCES}.torchvision_sets:imagenet",
        is_pictures=True,
    ),
    DataEntry(
        "folder",
        "your images, one folder per class; ?classes=FILE for the model's order of them",
        "folder:PATH",
        load=f"{_SOURCES}.image_files:load",
        is_path=True,
        is_pictures=True,
    ),
    DataEntry(
        "webdataset",
        "your images in tar shards, each KEY.jpg or such with its KEY.cls",
        "webdataset:PATH",
        load=f"{_SOURCES}.shards:load",
        is_path=True,
        is_pictures=True,
    ),
    DataEntry(
        "cifar-c",
        "a folder of CIFAR-10-C or its like, NAME.npy and labels.npy; ?corruption=NAME@SEVERITY",
        "cifar-c:PATH?corruption=fog@3",
        load="robustkit.data.corruptions.samples:load",
        is_path=True,
    ),
    DataEntry(
        "list",
        "your image files and their labels, listed in CSV (path,label) or JSONL",
        "PATH.csv",
        load=f"{_SOURCES}.listed_files:load",
        is_pictures=True,
    ),
    DataEntry(
        "hf-data",
        "a data set of the Hugging Face hub, or a local folder of Parquet files; needs the library datasets",
        "hf-data:NAME:SPLIT",
        load=f"{_SOURCES}.hf_datasets:load",
        is_pictures=True,
    ),
    DataEntry(
        "npz",
        "your arrays: x (images), y (labels), optionally classes (names); ?layout=NCHW or NHWC",
        "PATH.npz",
        load=f"{_SOURCES}.npz:load",
    ),
)

CATALOG: dict[str, DataEntry] = {entry.name: entry for entry in _ENTRIES}
