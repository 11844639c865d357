"""Record of a model's accuracy on corrupted images: corruptions.json. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Annotated, Any

from robustkit.core.flags import Flag
from robustkit.core.schema import FORMAT, OneOf, Positive, build, check_format
from robustkit.runs.report_parts import Cost, Rate
from robustkit.runs.spec import Data, Environment, Format, Model, Spec, dumps


@dataclass(frozen=True)
class CorruptionSpec(Spec):
    """Everything that determines the numbers."""

    model: Model
    data: Data
    corruptions: Sequence[str]
    severities: Sequence[Positive]
    seed: int
    verb: Annotated[str, OneOf("corrupt")] = "corrupt"
    format: Format = FORMAT


@dataclass(frozen=True)
class Corruptions:
    """The record in corruptions.json.

    Attributes:
        run_id: of its spec.
        spec: see `CorruptionSpec`.
        n: images used.
        clean: the accuracy on the images as they are; None for a folder of corrupted images only.
        accuracy: of each corruption, at each severity in the order of the spec.
        mean: over all corruptions and severities; its interval is that of the images' mean accuracies.
        cost: of all passes.
        relative_error: the mean over corruptions of the error, as a share of AlexNet's on the same corruption
            ("mean corruption error" of ImageNet-C); None where the classes are not those of ImageNet-1k, or not
            all corruptions and severities were used.
        environment: versions, device, commit.
        flags: reasons to doubt all this.
    """

    run_id: str
    spec: CorruptionSpec
    n: Positive
    clean: Rate | None
    accuracy: Mapping[str, Sequence[Rate]]
    mean: Rate
    cost: Cost
    relative_error: float | None = None
    environment: Environment = field(default_factory=dict)
    flags: Sequence[Flag] = ()
    format: Format = FORMAT

    @property
    def mean_accuracy(self) -> Mapping[str, float]:
        """The mean over severities, by corruption."""
        return {name: sum(rate.value for rate in rates) / len(rates) for name, rates in self.accuracy.items()}

    @property
    def mean_error(self) -> float:
        """The mean error over all corruptions and severities."""
        return 1 - self.mean.value

    def to_json(self) -> dict[str, Any]:
        """Return the record as corruptions.json holds it, `format` first."""
        kept = [f.name for f in fields(self) if f.name != "format"]
        return {"format": self.format, **json.loads(dumps({name: getattr(self, name) for name in kept}))}

    @classmethod
    def from_json(cls, body: Any, name: str = "this record") -> Corruptions:
        """Return the record of a parsed corruptions.json; UsageError if it is invalid."""
        check_format(body, name)
        return build(cls, body, name)

    def faults(self) -> Iterator[str]:
        """Yield contradictions in the record."""
        if set(self.accuracy) != set(self.spec.corruptions):
            yield "has other corruptions than its spec"
        if any(len(rates) != len(self.spec.severities) for rates in self.accuracy.values()):
            yield "has other severities than its spec"
        rates = [rate.value for rates in self.accuracy.values() for rate in rates]
        if rates and abs(sum(rates) / len(rates) - self.mean.value) > 1e-9:
            yield "has a mean that is not that of its accuracies"
