"""Samples of a `DataLoader` or a dataset of (image, label) pairs, read once into memory."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader

from robustkit.core.errors import RobustkitError, UsageError
from robustkit.core.memory import free_memory
from robustkit.data.samples import Samples
from robustkit.data.sources.arrays import from_arrays
from robustkit.data.sources.tensors import as_array

# The names of images and labels where an item is a dict.
_IMAGES = ("image", "images", "img", "pixel_values", "x", "input", "inputs")
_LABELS = ("label", "labels", "target", "targets", "y", "fine_label")
# Pillow's modes of at most 8 bits per channel, grey and in colour.
_GREY, _COLOUR = ("1", "L", "LA", "La"), ("P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr", "LAB", "HSV")


def is_dataset(data: Any) -> bool:
    """Return whether data given without labels holds them itself, item by item or batch by batch."""
    return not hasattr(data, "dtype") and (isinstance(data, Iterable) or _has_places(data))


def _has_places(data: Any) -> bool:
    return hasattr(data, "__len__") and hasattr(data, "__getitem__")


def from_dataset(data: Any) -> Samples:
    """Return the samples of a data loader, a dataset or an iterator, in its own order.

    All images are read, once: a transform that draws at random is then the same for every attack.

    Args:
        data: gives items (image, label) or batches of them (images, labels), or is one batch. Images are floats
            (C H W) on [0, 1], uint8, or Pillow's; labels as in `class_numbers`. Items may be dicts.

    Raises:
        UsageError: an item cannot be read or is no such pair, or the images do not fit half of the free memory.
    """
    name = f"python:{type(data).__name__}"
    room = free_memory() // 2
    images: list[npt.NDArray[Any]] = []
    labels: list[Any] = []
    for number, item in enumerate(_items(data, name)):
        image, label = _pair(item, name, number)
        pixels = _pixels(image, name, number)
        # A loader without batches returns the items of its dataset.
        batched = pixels.ndim == 4 or (isinstance(data, DataLoader) and data.batch_sampler is not None)
        if batched and (not hasattr(label, "__len__") or len(label) != len(pixels)):
            raise UsageError(
                f"{name}: batch {number} of {len(pixels)} images has other than {len(pixels)} labels; return one "
                "label per image."
            )
        images.append(pixels if batched else pixels[None])
        labels += list(label) if batched else [label]
        room -= pixels.nbytes
        if room < 0:
            raise UsageError(
                f"{name}: {sum(map(len, images))} of its images take more than half of the free memory; "
                "pass fewer with torch.utils.data.Subset, or files by load_data('folder:PATH')."
            )
        if (images[-1].shape[1:], images[-1].dtype) != (images[0].shape[1:], images[0].dtype):
            raise UsageError(
                f"{name}: item {number} has {images[-1].dtype} images of shape {images[-1].shape[1:]}, the first "
                f"{images[0].dtype} of {images[0].shape[1:]}; bring all images to one form."
            )
    if not images:
        raise UsageError(f"{name} holds no images; pass a dataset with at least one.")
    classes, by_name = _classes(data)
    array = np.concatenate(images)
    # Tensors have their channels first, whatever their type.
    first = isinstance(image, torch.Tensor)
    return from_arrays(
        torch.from_numpy(array) if first else array, labels, name=name, classes=classes, by_name=by_name
    )


def _items(data: Any, name: str) -> Iterator[Any]:
    """Yield batches or items; an error of the dataset becomes a UsageError of one sentence."""
    if isinstance(data, Mapping) or (isinstance(data, tuple | list) and len(data) == 2 and _is_batch(data[0])):
        items = iter([data])
    elif _has_places(data) and not isinstance(data, DataLoader):
        items = (data[number] for number in range(len(data)))
    else:
        items = iter(data)
    for number in itertools.count():
        try:
            item = next(items)
        except StopIteration:
            return
        except RobustkitError:
            raise
        except Exception as error:
            reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            raise UsageError(
                f"{name}: reading item {number} failed with {reason}; correct the dataset."
            ) from error
        yield item


def _is_batch(images: Any) -> bool:
    return getattr(images, "ndim", None) == 4


def _pair(item: Any, name: str, number: int) -> tuple[Any, Any]:
    if isinstance(item, Mapping):
        keys_found = [next((key for key in keys if key in item), None) for keys in (_IMAGES, _LABELS)]
        if None not in keys_found:
            return item[keys_found[0]], item[keys_found[1]]
        keys = ", ".join(map(str, item))
        raise UsageError(f"{name}: item {number} has the keys {keys}; call them 'image' and 'label'.")
    if isinstance(item, list | tuple) and len(item) >= 2:
        return item[0], item[1]
    raise UsageError(f"{name}: item {number} is a {type(item).__name__}; return (image, label).")


def _pixels(image: Any, name: str, number: int) -> npt.NDArray[Any]:
    if isinstance(image, torch.Tensor):
        return as_array(image, name)
    if hasattr(image, "convert"):
        if image.mode not in (*_GREY, *_COLOUR):
            raise UsageError(
                f"{name}: item {number} has more than 8 bits per pixel (mode {image.mode}); pass its numbers as "
                "floats in [0, 1]."
            )
        grey = image.mode in _GREY
        pixels = np.asarray(image.convert("L" if grey else "RGB"))
        return pixels[..., None] if grey else pixels
    return np.asarray(image)


def _maite_classes(data: Any) -> list[str] | None:
    """Return the names in the metadata of a MAITE data set, if it has one for each number."""
    metadata = getattr(data, "metadata", None)
    labels = metadata.get("index2label") if isinstance(metadata, Mapping) else None
    if not isinstance(labels, Mapping) or sorted(labels) != list(range(len(labels))):
        return None
    return [str(labels[number]) for number in range(len(labels))]


def _classes(data: Any) -> tuple[tuple[str, ...] | None, bool]:
    """Return the names of a dataset's classes, and whether they are numbered as they sort."""
    while hasattr(data, "dataset"):
        data = data.dataset
    names = getattr(data, "classes", None) or _maite_classes(data)
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        return None, False
    return tuple(names), hasattr(data, "class_to_idx") and list(names) == sorted(names)
