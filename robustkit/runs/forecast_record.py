"""What an evaluation will take, measured before it is run: the record of `robustkit plan`. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from robustkit.core.errors import UsageError
from robustkit.core.schema import FORMAT
from robustkit.runs.evaluation_record import dumps

DEVICES = (1, 8, 64)
MAX_DEVICES = 1024


@dataclass(frozen=True)
class Estimate:
    """A number to be expected, and its 95 % interval."""

    value: float
    low: float
    high: float

    def plus(self, other: Estimate) -> Estimate:
        """Return the sum with another, ends with ends."""
        return Estimate(self.value + other.value, self.low + other.low, self.high + other.high)

    def times(self, factor: float) -> Estimate:
        """Return so many times it."""
        return Estimate(self.value * factor, self.low * factor, self.high * factor)


@dataclass(frozen=True)
class Trial:
    """The images that were attacked to find out: how many, how many got their verdict, how many withstood.

    `seconds` are those of the attacks on them.
    """

    images: int
    through: int
    robust: int
    seconds: float


@dataclass(frozen=True)
class Speed:
    """Seconds for an image, forward and with the backward pass, `at_once` in a pass; and what any pass takes."""

    forward: float
    both: float
    fixed: float
    at_once: int
    precision: str


@dataclass(frozen=True)
class Memory:
    """Bytes on each device: in use before the measurement, model included, and at the most."""

    held: int
    peak: int


@dataclass(frozen=True)
class Scale:
    """A run on so many devices like the one measured.

    `seconds` are from the loaded model to the last verdict; `money` is None without a price. `efficiency` is how
    much of so many times one device's pace is left; `shares` what the devices' time goes to, and `bound` the
    largest of these that is not the attacks.
    """

    devices: int
    seconds: Estimate
    device_hours: Estimate
    money: Estimate | None
    efficiency: float
    shares: Mapping[str, float]
    bound: str


@dataclass(frozen=True)
class Plan:
    """What `robustkit plan` prints.

    Attributes:
        model: its string.
        data: its string.
        n: images in it.
        threat: what the attacker may do.
        suite: the attacks, as written.
        seed: by which the images of the trial were drawn.
        trial: see `Trial`.
        speed: see `Speed`.
        propagations: for each image, forward and backward counted apart, checks and clean pass left out.
        arms: what of them goes to the arms of the suite; None of one without.
        most: propagations of an image that withstands all attacks for as long as they may last; None: not known.
        memory: see `Memory`.
        price: of a device for an hour, in whatever money.
        scales: one for each number of devices.
        environment: versions, device, commit.
    """

    model: str
    data: str
    n: int
    threat: str
    suite: str
    seed: int
    trial: Trial
    speed: Speed
    propagations: Estimate
    arms: Estimate | None
    most: int | None
    memory: Memory
    price: float | None
    scales: Sequence[Scale]
    environment: Mapping[str, Any] = field(default_factory=dict)
    format: int = FORMAT

    def to_json(self) -> dict[str, Any]:
        """Return the record as JSON has it, `format` first."""
        kept = [f.name for f in fields(self) if f.name != "format"]
        return {"format": self.format, **json.loads(dumps({name: getattr(self, name) for name in kept}))}


def refuse_devices(devices: Sequence[int], text: object) -> None:
    """Raise UsageError unless they are numbers of devices that can be meant."""
    if not devices or min(devices) < 1 or max(devices) > MAX_DEVICES:
        raise UsageError(f"devices {text!r}: write whole numbers from 1 to {MAX_DEVICES:,}, e.g. 1,8,64.")
