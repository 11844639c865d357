"""Matching of the data's classes with a model's: by `?classes=`, by the names of both, or by ImageNet's ids.

Class folders are numbered in sorted order, which is the model's order only if it was trained on the same folders.
"""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from robustkit.core.errors import UsageError
from robustkit.core.flags import Flag
from robustkit.data.regular_files import open_regular
from robustkit.data.samples import Samples

WNID = re.compile(r"n\d{8}")
_MAX_BYTES = 16 << 20
_MAX_CLASSES = 1 << 20
# The most names that a remedy lists.
_WRITTEN = 12


@dataclass(frozen=True)
class ClassOrder:
    """The order of a model's classes.

    Args:
        numbers: the number of each name; several names may have one number.
        names: one name for each number.
        listed: whether the names were given as a list, which fits a model only if it has as many classes.
    """

    numbers: dict[str, int]
    names: tuple[str, ...]
    listed: bool

    @classmethod
    def of(cls, pairs: Sequence[tuple[str, int]], source: str) -> ClassOrder:
        """Return the order given by pairs of name and number; several names may have one number.

        Raises:
            UsageError: there is no pair, a name has two numbers, or a number is out of range.
        """
        numbers: dict[str, int] = {}
        for name, number in pairs:
            if name in numbers and numbers[name] != number:
                raise UsageError(f"{source} has the class {name!r} twice; write each class once.")
            if not 0 <= number < _MAX_CLASSES:
                raise UsageError(
                    f"{source} gives the class {name!r} the number {number}; write one from 0 to "
                    f"{_MAX_CLASSES - 1}."
                )
            numbers[name] = number
        if not numbers:
            raise UsageError(f"{source} names no class; write the model's class names in its order.")
        first = {number: name for name, number in reversed(numbers.items())}
        listed = [number for _, number in pairs] == list(range(len(pairs)))
        return cls(numbers, tuple(first.get(number, str(number)) for number in range(max(first) + 1)), listed)


def read_order(text: str) -> ClassOrder:
    """Return the order of the model's classes that the field `classes=` gives.

    Args:
        text: names with commas between, or a file: one name per line, CSV of names and numbers, a JSON list of
            names, or a JSON object from names to numbers or from numbers to names.

    Raises:
        UsageError: the file is absent or of another form.
    """
    path = Path(os.path.expanduser(text))
    if not os.path.exists(path) and "," in text:
        return ClassOrder.of(
            [(name.strip(), number) for number, name in enumerate(text.split(","))], f"classes={text}"
        )
    try:
        with open_regular(path) as file:
            content = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise UsageError(
            f"classes={text} cannot be read ({error.strerror or error}); write a file of class names, or the "
            "names with commas between."
        ) from error
    if len(content) > _MAX_BYTES:
        raise UsageError(f"{path} has more than {_MAX_BYTES:,} bytes; write a file of class names.")
    try:
        body = content.decode("utf-8-sig")
        pairs = _from_json(json.loads(body)) if body.lstrip()[:1] in ("[", "{") else _from_lines(body)
    except (ValueError, RecursionError, csv.Error) as error:
        raise UsageError(
            f"{path} is no list of classes; write one name per line, CSV of name and number, or JSON of either."
        ) from error
    return ClassOrder.of(pairs, str(path))


def _from_json(body: Any) -> list[tuple[str, int]]:
    if isinstance(body, list) and all(isinstance(name, str) for name in body):
        return [(name, number) for number, name in enumerate(body)]
    if not isinstance(body, dict):
        raise ValueError
    if all(type(number) is int for number in body.values()):
        return list(body.items())
    # {"0": "cat"}, or {"0": ["n02123045", "tabby"]} as ImageNet's classes are often handed on.
    names = [(value if isinstance(value, list) else [value], int(number)) for number, value in body.items()]
    if not all(isinstance(name, str) for several, _ in names for name in several):
        raise ValueError
    return [(name, number) for several, number in names for name in several]


def _from_lines(body: str) -> list[tuple[str, int]]:
    lines = [line.strip() for line in body.splitlines() if line.strip()]
    rows = [[cell.strip() for cell in row] for row in csv.reader(lines)]
    if rows and all(len(row) == 2 for row in rows):
        for number, name in ((1, 0), (0, 1)):
            # The first row may be a header.
            body_rows = rows if rows[0][number].isdecimal() else rows[1:]
            if body_rows and all(row[number].isdecimal() for row in body_rows):
                return [(row[name], int(row[number])) for row in body_rows]
    words = [line.split()[0] for line in lines]
    # ImageNet's own list has the id and then the words.
    names = words if all(map(WNID.fullmatch, words)) else lines
    return [(name, number) for number, name in enumerate(names)]


def relabelled(samples: Samples, order: ClassOrder) -> Samples:
    """Return the samples with the labels that an order gives the names of their classes.

    Samples without names have numbers already, which then get names.

    Raises:
        UsageError: a class that occurs is not in the order.
    """
    if samples.classes is None:
        top = int(samples.labels.max())
        if top >= len(order.names):
            raise UsageError(
                f"{samples.name} has the label {top}, but classes= names {len(order.names)}; name them all."
            )
        return replace(samples, classes=order.names, fixed=True, listed=order.listed)
    occurring = [samples.classes[number] for number in np.unique(samples.labels)]
    if missing := [name for name in occurring if name not in order.numbers]:
        raise UsageError(
            f"{samples.name} has the class {missing[0]!r}, which is not among the {len(order.numbers)} names of "
            "classes=; add it with its number."
        )
    places = [order.numbers.get(name, -1) for name in samples.classes]
    return replace(_placed(samples, places, order.names), fixed=True, listed=order.listed)


def match_classes(samples: Samples, count: int | None, names: Sequence[str] | None) -> Samples:
    """Return the samples with labels renumbered as the model's classes if the names match, else with flags.

    Args:
        samples: samples with labels numbered as their `classes`.
        count: number of the model's classes, if known.
        names: the model's class names in its order, if known.
    """
    classes = samples.classes
    if classes is None:
        return samples
    if samples.fixed:
        # With explicit numbers, some of the model's classes are enough.
        if count is None or count == len(classes) or (len(classes) < count and not samples.listed):
            return samples
        return replace(samples, label_flags=(_other_length(len(classes), count),))
    for order in (names, _imagenet(classes, count)):
        places = _found(classes, order) if order else None
        if order is None or places is None:
            continue
        if places == list(range(len(order))):
            return samples
        note = f"the {len(classes)} classes of the data are matched by name to the model's {len(order)}"
        return replace(_placed(samples, places, tuple(order)), by_name=False, notes=(*samples.notes, note))
    return replace(samples, label_flags=tuple(_doubts(classes, count, names))) if samples.by_name else samples


def _placed(samples: Samples, places: list[int], names: tuple[str, ...]) -> Samples:
    return replace(samples, labels=np.array(places, np.int64)[samples.labels], classes=names)


def _found(classes: Sequence[str], order: Sequence[str]) -> list[int] | None:
    """Return the model's number of each class; None unless it has each of them under exactly one name."""
    for spelling in (str, _plain):
        known = [spelling(name) for name in order]
        wanted = [spelling(name) for name in classes]
        if len(set(wanted)) == len(wanted) and all(known.count(name) == 1 for name in wanted):
            return [known.index(name) for name in wanted]
    return None


def _plain(name: str) -> str:
    return " ".join(re.split(r"[\s_-]+", name.casefold()))


def _imagenet(classes: Sequence[str], count: int | None) -> list[str] | None:
    """Return ImageNet's class ids in the order of a model with `count` classes, if the data has such names."""
    if count is None or not all(map(WNID.fullmatch, classes)):
        return None
    # The import takes seconds.
    from timm.data import ImageNetInfo, infer_imagenet_subset

    subset = infer_imagenet_subset({"num_classes": count})
    return None if subset is None else ImageNetInfo(subset).label_names()


def _doubts(classes: tuple[str, ...], count: int | None, names: Sequence[str] | None) -> list[Flag]:
    found = []
    if count is not None and count != len(classes):
        found.append(
            Flag(
                "class-count",
                "warning",
                len(classes),
                f"classes are in the data and {count} in the model: labels are places in the sorted names, which "
                "are the model's own numbers only if all its other classes sort after them",
                "write the model's classes in its order as ?classes=FILE after the data, or give data of all",
            )
        )
    elif names is not None:
        found.append(
            Flag(
                "class-names",
                "warning",
                len(classes),
                f"classes of the data have other names ({', '.join(classes[:3])}, ...) than the model's "
                f"({', '.join(names[:3])}, ...): labels are places in the sorted names",
                "name the classes of the data in the model's order with ?classes=FILE after the data",
            )
        )
    if (natural := sorted(classes, key=_by_number)) != list(classes):
        order = ",".join(natural) if len(natural) <= _WRITTEN else "FILE"
        found.append(
            Flag(
                "class-order",
                "warning",
                None,
                f"the names of the classes are sorted as text, as torchvision's ImageFolder does "
                f"({', '.join(classes[:3])}, ...), and not by their numbers ({', '.join(natural[:3])}, ...)",
                f"if the model's order is that of the numbers, write ?classes={order} after the data",
            )
        )
    return found


def _other_length(named: int, count: int) -> Flag:
    return Flag(
        "class-count",
        "warning",
        named,
        f"classes are named by classes= and {count} in the model: the position or number of a name there is used "
        f"as the model's number of that class",
        "list the names of all classes of the model in its order, or write a file of names and numbers",
    )


def _by_number(name: str) -> list[tuple[int, int | str]]:
    """Return a key that sorts the numbers in names by their value; a sign counts at the beginning alone."""
    parts = re.split(r"(^-[0-9]{1,18}|[0-9]{1,18})", name)
    return [(0, int(part)) if index % 2 else (1, part) for index, part in enumerate(parts) if part]


def absolute(text: str) -> str:
    """Return the field `classes=` so that it is found from any folder."""
    path = os.path.expanduser(text)
    return os.path.abspath(path) if os.path.exists(path) else text
