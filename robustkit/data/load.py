"""Samples from a data string."""

from __future__ import annotations

import os
from dataclasses import replace
from importlib import import_module
from pathlib import Path

from robustkit.core.errors import UsageError, did_you_mean
from robustkit.core.preprocess import Preprocess
from robustkit.data.catalog import CATALOG
from robustkit.data.classes import absolute, read_order, relabelled
from robustkit.data.request import DataRequest
from robustkit.data.samples import Samples
from robustkit.data.strings import DataString
from robustkit.registry.plugins import Plugin, plugins

# The kinds of data that are files, by the ends of their names.
FILES = {".npz": "npz", ".csv": "list", ".jsonl": "list"}


def load_data(
    string: str, *, root: Path | None = None, download: bool = False, preprocess: Preprocess | None = None
) -> Samples:
    """Return the samples that a data string names.

    The order is fixed: that of the file for arrays, and a fixed shuffle for `digits`, `imagenet`, `folder:PATH`
    and `webdataset:SHARDS`, whose own order may be by class.

    Args:
        string: `NAME[:SPLIT]`, `folder:PATH`, `webdataset:SHARDS`, `hf-data:NAME:SPLIT`, or a path that ends in
            `.npz`, `.csv` or `.jsonl`; with `?classes=` the names of the model's classes in its order (see
            `read_order`), with `?corruption=fog@3` corrupted images, and for arrays with `?layout=` NCHW or NHWC.
        root: folder of downloaded data sets; the default is $ROBUSTKIT_DATA, else ~/.cache/robustkit/data.
        download: whether a missing data set is downloaded, if torchvision can.
        preprocess: how image files are resized and cropped for the model; arrays are not changed.

    Returns:
        The samples; images are read when they are used.

    Raises:
        UsageError: an unknown name or split, or files that are missing or invalid.

    Example:
        >>> samples = load_data("digits:test").head(8)
        >>> samples.images([0, 1]).shape, samples.labels.shape, samples.num_classes
        (torch.Size([2, 1, 8, 8]), (8,), 10)
    """
    spec = DataString.parse(string)
    if "classes" in spec.options:
        spec = replace(spec, options=spec.options | {"classes": absolute(spec.options["classes"])})
    file = _file_kind(spec.head) if not spec.is_path else None
    is_npz = file == "npz"
    if "layout" in spec.options and not is_npz:
        raise UsageError(f"data {string!r} has a layout=, which only .npz arrays need; leave it out.")
    samples = _loaded(file or spec.name, DataRequest(spec, "", root, download, preprocess))
    if "classes" in spec.options:
        samples = relabelled(samples, read_order(spec.options["classes"]))
    if "corruption" in spec.options:
        from robustkit.data.corruptions.samples import corrupted, parse

        samples = corrupted(samples, *parse(spec.options["corruption"]))
    return replace(samples, name=f"{samples.name}{spec.query}")


def _file_kind(path: str) -> str | None:
    """Return the kind of data that a file is by the end of its name; None if it is none."""
    return FILES.get(os.path.splitext(path)[1].lower())


def _loaded(name: str, request: DataRequest) -> Samples:
    """Return the samples of an entry of the catalog, or of an installed package."""
    spec = request.spec
    if name not in CATALOG and name in plugins("data"):
        return _installed(plugins("data")[name], spec.head)
    if name not in CATALOG or (name in FILES.values() and _file_kind(spec.head) != name):
        raise _unknown(spec.head, name)
    entry = CATALOG[name]
    if entry.splits:
        split = entry.default_split if spec.rest is None else spec.rest
        if split not in entry.splits:
            raise did_you_mean(f"split of {name}", str(split), entry.splits)
        request = replace(request, split=str(split))
    module, _, function = entry.load.partition(":")
    samples: Samples = getattr(import_module(module), function)(request)
    return samples


def _installed(plugin: Plugin, string: str) -> Samples:
    """Return the samples of an installed package, whose function is given the text after the colon."""
    from robustkit.data.sources.arrays import from_arrays

    images, labels = plugin.call(string.partition(":")[2])
    return from_arrays(images, labels, string)


def _unknown(string: str, name: str) -> UsageError:
    """Return the error for a string that is neither a known name nor a readable path."""
    file, npz, split = string.partition(".npz:")
    if npz:
        return UsageError(f"{string!r} names the split {split!r}, but an .npz file has none; write {file}.npz.")
    if name in FILES.values():
        return UsageError(f"{string!r} names no file; write a path that ends in .npz, .csv or .jsonl, alone.")
    path = os.path.expanduser(string)
    if os.path.isdir(path):
        return UsageError(f"{string!r} is a folder; write folder:{string} if it holds one folder per class.")
    if string.lower().endswith(".tar"):
        return UsageError(f"{string!r} is a tar file by its name; write webdataset:{string} if it is a shard.")
    if os.path.exists(path):
        return UsageError(f"{string!r} is not an .npz file; write folder:PATH, or a path that ends in .npz.")
    return did_you_mean("data", name, CATALOG)
