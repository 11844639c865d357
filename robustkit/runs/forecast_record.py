"""The cost of an evaluation, measured before it is run: the record of `robustkit plan`. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from robustkit.core.errors import UsageError
from robustkit.core.schema import FORMAT
from robustkit.runs.spec import dumps

DEVICES = (1, 8, 64)
MAX_DEVICES = 1024


@dataclass(frozen=True)
class Estimate:
    """An expected number, and its 95 % interval."""

    value: float
    low: float
    high: float

    def plus(self, other: Estimate) -> Estimate:
        """Return the sum with another estimate, of values and of ends."""
        return Estimate(self.value + other.value, self.low + other.low, self.high + other.high)

    def times(self, factor: float) -> Estimate:
        """Return the estimate times a factor."""
        return Estimate(self.value * factor, self.low * factor, self.high * factor)


@dataclass(frozen=True)
class Trial:
    """The images that were attacked for the forecast: their number, those with a verdict, and those still robust.

    `seconds` are those of the attacks on them.
    """

    images: int
    through: int
    robust: int
    seconds: float


@dataclass(frozen=True)
class Speed:
    """Seconds for an image, forward and with the backward pass, `at_once` in a pass; and those of any pass."""

    forward: float
    both: float
    fixed: float
    at_once: int
    precision: str


@dataclass(frozen=True)
class Memory:
    """Bytes on each device: in use before the measurement, model included, and at the peak."""

    held: int
    peak: int


@dataclass(frozen=True)
class Scale:
    """A run on several devices like the one measured.

    `seconds` are from the loaded model to the last verdict; `money` is None without a price. `efficiency` is the
    speed relative to the same number of independent devices; `shares` are the shares of the devices' time, and
    `bound` is the largest of these besides the attacks.
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
        seed: of the random choice of the trial's images.
        trial: see `Trial`.
        speed: see `Speed`.
        propagations: for each image, forward and backward passes, without the checks and the clean pass.
        arms: those of the suite's arms; None for a suite without arms.
        most: the largest number of propagations of an image that stays robust; None if unknown.
        memory: see `Memory`.
        price: of a device for an hour, in any currency.
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
        """Return the record as JSON, `format` first."""
        kept = [f.name for f in fields(self) if f.name != "format"]
        return {"format": self.format, **json.loads(dumps({name: getattr(self, name) for name in kept}))}


def refuse_devices(devices: Sequence[int], text: object) -> None:
    """Raise UsageError for invalid numbers of devices."""
    if not devices or min(devices) < 1 or max(devices) > MAX_DEVICES:
        raise UsageError(f"devices {text!r}: write whole numbers from 1 to {MAX_DEVICES:,}, e.g. 1,8,64.")
