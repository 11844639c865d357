"""The fields of a model string's query, with their types. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from robustkit.core.errors import UsageError, did_you_mean
from robustkit.core.numbers import whole
from robustkit.models.sources.source import find_source
from robustkit.models.strings import ENSEMBLE, FOLDER, SOURCE, ModelString
from robustkit.registry import parse_defenses

LOGIT, PROBABILITY = "logit", "probability"
_EVERY_KIND = frozenset({"mean", "std", "size", "output", "binary", "defense"})
_FIELDS = {
    FOLDER: _EVERY_KIND | {"combine", "noise"},
    # Its members have normalisations and sizes of their own.
    ENSEMBLE: frozenset({"combine", "defense"}),
}
_BOOLEANS = {"true": True, "false": False}
# Larger values are refused: they would be a mistake, or an attempt to allocate gigabytes.
MAX_PIXELS, MAX_CLASSES, MAX_CHANNELS, MAX_DEFENSES = 4_096, 100_000, 4_096, 8


@dataclass(frozen=True)
class Options:
    """The fields of a query; None for those that it does not have.

    Attributes:
        mean: Subtracted from each channel, in [0, 1] pixel units; one number serves every channel.
        std: Divides each channel afterwards, above 0; one number serves every channel.
        size: Height and width that images are resized to inside the classifier, in pixels, 4096 at most.
        num_classes: Classes of the net's last layer, 2 to 100,000.
        in_channels: Channels of the images, 1 to 4096.
        output: Where the logits are in what the net returns, as a key, attribute or index.
        binary: What a net of one number per image returns: `logit` or `probability`, of class 1.
        defenses: Transformations of the images before the net, in the order in which they are applied.
        combine: Name of the aggregator of several nets (`robustkit.models.ensembles.aggregation`).
        noise: The policy of a trained net's own random numbers: `fresh`, `frozen`, `content`, `calm`.
        weights: Which set of tensors of the weights file is meant, where it holds several.
        pretrained: Whether the source's own trained weights are used where the string names no file.
        keywords: Every other field, for a factory given as Python code.
    """

    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    size: tuple[int, int] | None = None
    num_classes: int | None = None
    in_channels: int | None = None
    output: str | None = None
    binary: str | None = None
    defenses: tuple[Any, ...] = ()
    combine: str | None = None
    noise: str | None = None
    weights: str | None = None
    pretrained: bool = True
    keywords: dict[str, object] = field(default_factory=dict)

    @classmethod
    def read(cls, spec: ModelString) -> Options:
        """Return the typed fields of a model string.

        Raises:
            UsageError: A field is unknown to this kind of net, or its value cannot be read.
        """
        given = dict(spec.options)
        kind, fields = spec.kind, _FIELDS.get(spec.kind)
        if spec.kind == SOURCE:
            kind, own = spec.source, find_source(spec.source).fields
            fields = None if own is None else _EVERY_KIND | own
        legal = _EVERY_KIND if fields is None else fields
        # Without a file of weights the word is a factory's.
        legal = legal if spec.weights is None else legal | {"weights"}
        taken = {name: given.pop(name) for name in legal if name in given}
        if "weights" in given and fields is not None:
            raise UsageError(
                f"{str(spec)!r} names no weights file in which weights={given['weights']} could choose: write "
                f"{spec.arch}@FILE?weights={given['weights']}, or leave it out."
            )
        if given and fields is not None:
            raise did_you_mean(f"field of {kind} models", next(iter(given)), legal)
        return cls(
            mean=read_mean(taken["mean"], str(spec)) if "mean" in taken else None,
            std=read_std(taken["std"], str(spec)) if "std" in taken else None,
            size=read_size(taken["size"], str(spec)) if "size" in taken else None,
            num_classes=_count("num_classes", taken, 1 if "binary" in taken else 2, MAX_CLASSES),
            in_channels=_count("in_channels", taken, 1, MAX_CHANNELS),
            output=_named("output", taken),
            weights=_named("weights", taken),
            binary=read_binary(taken["binary"]) if "binary" in taken else None,
            defenses=_defenses(taken["defense"]) if "defense" in taken else (),
            combine=taken.get("combine"),
            noise=taken.get("noise"),
            pretrained=_boolean("pretrained", taken.get("pretrained", "true")),
            keywords={name: keyword_value(text) for name, text in given.items()},
        )


def read_mean(text: str, where: str) -> tuple[float, ...]:
    """Return comma-separated channel means as numbers.

    Raises:
        UsageError: A part is not a finite number; `where` names its place in the message.
    """
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError:
        numbers = (math.nan,)
    if not all(math.isfinite(number) for number in numbers):
        raise UsageError(
            f"{where}: mean and std are numbers separated by commas, one per channel or one for all, "
            f"such as 0.5,0.5,0.5, not {text!r}."
        )
    return numbers


def read_std(text: str, where: str) -> tuple[float, ...]:
    """Return comma-separated channel deviations as numbers.

    Raises:
        UsageError: A part is not a finite number above 0; `where` names its place in the message.
    """
    numbers = read_mean(text, where)
    if min(numbers) <= 0:
        raise UsageError(f"{where}: std={text} divides by {min(numbers):g}: write numbers above 0.")
    return numbers


def read_binary(text: object) -> str:
    """Return how one number per image is read.

    Raises:
        UsageError: It is neither `logit` nor `probability`.
    """
    name = str(text)
    if name not in (LOGIT, PROBABILITY):
        raise did_you_mean("way to read a binary model:", name, (LOGIT, PROBABILITY))
    return name


def keyword_value(text: str) -> object:
    """Return a query's value as the bool, int, float or string that it reads as."""
    if text.lower() in _BOOLEANS:
        return _BOOLEANS[text.lower()]
    for number in (int, float):
        try:
            value = number(text)
        except ValueError:
            continue
        # "nan" and "inf" are more likely words than numbers in a factory's arguments.
        return value if math.isfinite(value) else text
    return text


def _defenses(text: str) -> tuple[Any, ...]:
    count = text.count("+") + 1
    if count > MAX_DEFENSES:
        raise UsageError(f"defense={text[:30]}… names {count:,} defenses: write at most {MAX_DEFENSES}.")
    return parse_defenses(text)


def read_size(text: str, where: str) -> tuple[int, int]:
    """Return an image size as height and width in pixels.

    Raises:
        UsageError: It is not one or two whole numbers; `where` names its place in the message.
    """
    sides = [whole_number(part, 1, MAX_PIXELS) for part in text.split(",")]
    if len(sides) > 2 or sides[0] is None or sides[-1] is None:
        raise UsageError(
            f"{where}: size={text[:30]} is no image size: write pixels as size=N, or size=HEIGHT,WIDTH, from 1 to "
            f"{MAX_PIXELS:,}."
        )
    return sides[0], sides[-1]


def whole_number(text: str, least: int, most: int) -> int | None:
    """Return the whole number of a text; None if it is none, or outside of these limits."""
    try:
        number = whole(text)
    except ValueError:
        return None
    return number if least <= number <= most else None


def _count(name: str, taken: dict[str, str], least: int, most: int) -> int | None:
    text = taken.get(name)
    if text is None:
        return None
    number = whole_number(text, least, most)
    if number is None:
        raise UsageError(
            f"{name}={text[:30]} is not possible: write a whole number of at least {least}, at most {most:,}."
        )
    return number


def _named(name: str, taken: dict[str, str]) -> str | None:
    text = taken.get(name)
    if text == "":
        raise UsageError(f"{name}= is empty: write a name after it, or leave it out.")
    return text


def _boolean(name: str, text: str) -> bool:
    if text.lower() not in _BOOLEANS:
        raise UsageError(f"{name}={text} is neither true nor false: write {name}=false or leave it out.")
    return _BOOLEANS[text.lower()]
