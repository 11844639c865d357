"""What determines a run, and its canonical JSON: Spec, RunSpec and the types of their parts. Imports no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Annotated, Any

from robustkit.core.schema import FORMAT, Count, Keys, OneOf, Positive, Share

Format = Annotated[int, OneOf(FORMAT)]
# A model, data, an attack or a method: its string and what determines it.
Model = Annotated[Mapping[str, Any], Keys(string=str, fingerprint=str)]
Data = Annotated[Mapping[str, Any], Keys(string=str, n=Positive, fingerprint=str)]
Named = Annotated[Mapping[str, Any], Keys(name=str)]
Environment = Annotated[
    Mapping[str, Any],
    Keys(
        versions=Mapping[str, str | None] | None,
        device_name=str | None,
        commit=str | None,
        precision=str | None,
        claims_refused=Count | None,
        training_flops=Sequence[Count | None] | None,
        parts=Sequence[Mapping[str, str | None]] | None,
    ),
]


@dataclass(frozen=True)
class Spec:
    """What determines a run, to be subclassed; the `string` of a part only says where it is found."""

    @property
    def run_id(self) -> str:
        """Eight hexadecimal digits of the hash of all that determines the run: strings and paths do not."""
        return hashlib.sha256(dumps(self.identity).encode()).hexdigest()[:8]

    @property
    def identity(self) -> dict[str, Any]:
        """What is hashed."""
        return {name: _content(value) for name, value in asdict(self).items()}


def _content(part: Any) -> Any:
    """Return a part of a spec without its string."""
    if isinstance(part, Mapping):
        return {key: value for key, value in part.items() if key != "string"}
    return [_content(one) for one in part] if isinstance(part, list | tuple) else part


@dataclass(frozen=True)
class RunSpec(Spec):
    """Everything that determines the numbers of a run, and the strings that locate model and data.

    `model` has `string` and `fingerprint`; `data` has `string`, `n` and `fingerprint`; `suite` is one record
    of name and fields per attack; `batch_size` is given only if random numbers depend on it, `strictness` only if
    it is not the default.
    """

    model: Model
    data: Data
    threat: str
    suite: Sequence[Named]
    seed: Count
    batch_size: Positive | None = None
    strictness: Share | None = None
    verb: Annotated[str, OneOf("evaluate")] = "evaluate"
    format: Format = FORMAT

    @property
    def minimal(self) -> bool:
        """Whether the run searches for minimum norms, under a threat such as `l2:min`."""
        return self.threat.endswith(":min")

    @property
    def identity(self) -> dict[str, Any]:
        """What is hashed; a strictness only if it is given, so that older runs keep their ids."""
        every = super().identity
        return {name: value for name, value in every.items() if name != "strictness" or value is not None}


def dumps(value: Any, *, indent: int | None = None) -> str:
    """Return canonical JSON: sorted keys at the inside, no NaN, dataclasses as objects, no other conversion."""
    return json.dumps(value, default=_encoded, sort_keys=indent is None, allow_nan=False, indent=indent)


def _encoded(thing: Any) -> Any:
    if hasattr(thing, "__dataclass_fields__"):
        return {f.name: getattr(thing, f.name) for f in fields(thing)}
    if isinstance(thing, Mapping):
        return dict(thing)
    raise TypeError(f"{type(thing).__name__} is no JSON value")
