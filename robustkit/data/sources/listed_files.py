"""Samples of image files that a CSV or JSONL file lists with their labels."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from robustkit.core.errors import UsageError, error_summary
from robustkit.data.decoding import check_interpolation
from robustkit.data.labels import class_numbers
from robustkit.data.regular_files import open_regular
from robustkit.data.request import DataRequest, absolute_path
from robustkit.data.samples import Samples
from robustkit.data.sources.image_files import FileSource

# The names of a column of paths and of one of labels; the first that a file has is used.
PATHS = ("path", "file", "file_name", "filename", "filepath", "image")
LABELS = ("label", "class", "target", "y", "class_name", "category")
MAX_BYTES = 1 << 30


def load(request: DataRequest) -> Samples:
    """Return the samples of `FILE.csv` or `FILE.jsonl`, in the order of the file.

    Paths are relative to the file's folder. Labels are whole numbers, or names, which are numbered as they sort.

    Raises:
        UsageError: the file is absent or of another form, or a listed file does not exist.
    """
    check_interpolation(request.preprocess)
    path = absolute_path(request.spec.head)
    pairs = list(_pairs(path))
    if not pairs:
        raise UsageError(f"{path} lists no image; write a line with a path and a label for each.")
    files = tuple(file for file, _ in pairs)
    labels: list[Any] = [label for _, label in pairs]
    if all(isinstance(label, str) and label.isdecimal() for label in labels):
        labels = [int(label) for label in labels]
    numbers, names = class_numbers(np.asarray(labels), str(path), len(files))
    for number, file in enumerate(files):
        if not (path.parent / file).is_file():
            raise UsageError(
                f"{path} lists {file!r} as image {number + 1}, and there is no such file in {path.parent}; write "
                "paths relative to the list."
            )
    source = FileSource(path.parent, files, request.preprocess)
    rows = np.arange(len(files), dtype=np.int64)
    return Samples(str(path), numbers, names, source, rows, by_name=names is not None)


def _pairs(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield the path and label of each line."""
    text = _text(path)
    if path.suffix.lower() == ".jsonl":
        yield from _from_jsonl(text, path)
        return
    rows = [row for row in csv.reader(text.splitlines()) if row]
    if not rows:
        return
    head = [cell.strip().lower() for cell in rows[0]]
    named = {cell: place for place, cell in reversed(list(enumerate(head)))}
    found = _columns(named)
    if found is None and len(head) != 2:
        raise UsageError(
            f"{path} has the columns {', '.join(rows[0])}; name the one of paths {PATHS[0]} and the one of labels "
            f"{LABELS[0]}."
        )
    places, body = ((0, 1), rows) if found is None else (found, rows[1:])
    for number, row in enumerate(body):
        if len(row) != len(head):
            raise UsageError(
                f"{path}: line {number + 1 + (found is not None)} has {len(row)} columns, the first {len(head)}; "
                "write as many in each."
            )
        yield row[places[0]].strip(), row[places[1]].strip()


def _from_jsonl(text: str, path: Path) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            raise UsageError(f"{path}: line {number} is no JSON; write an object in each line.") from None
        found = _columns({key: key for key in record}) if isinstance(record, Mapping) else None
        if found is None:
            raise UsageError(
                f'{path}: line {number} has no path and label; write {{"{PATHS[0]}": ..., "{LABELS[0]}": ...}}.'
            )
        file, label = record[found[0]], record[found[1]]
        if not isinstance(file, str) or isinstance(label, bool) or not isinstance(label, int | str):
            raise UsageError(f"{path}: line {number} needs a path as text, and a number or name as its label.")
        yield file, label


def _columns(named: Mapping[str, Any]) -> tuple[Any, Any] | None:
    found = [next((named[name] for name in names if name in named), None) for names in (PATHS, LABELS)]
    return None if None in found else (found[0], found[1])


def _text(path: Path) -> str:
    try:
        with open_regular(path) as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise UsageError(f"{path} has more than {MAX_BYTES:,} bytes; divide the list.")
        return content.decode("utf-8-sig")
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror or error}); check its path.") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is no text in UTF-8 ({error_summary(error)}); save it as UTF-8.") from error
