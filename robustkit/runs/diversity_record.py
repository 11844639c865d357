"""Record of the weaknesses that members of an ensemble share: diversity.json. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Annotated, Any

from robustkit.core.flags import Flag
from robustkit.core.schema import FORMAT, Count, OneOf, Positive, build, check_format
from robustkit.runs.report_parts import Cost, Rate
from robustkit.runs.spec import Data, Environment, Format, Model, Spec, dumps


@dataclass(frozen=True)
class DiversitySpec(Spec):
    """Everything that determines the numbers. `images` are the positions used; None for all of the data."""

    model: Model
    data: Data
    threat: str
    steps: Positive
    restarts: Positive
    seed: Count
    images: Sequence[Count] | None = None
    verb: Annotated[str, OneOf("diversity")] = "diversity"
    format: Format = FORMAT


@dataclass(frozen=True)
class Bounds:
    """Accuracy of the ensemble, and of oracles that choose among its members.

    `best` is the best single member. `any` counts the images that at least one member classifies correctly,
    `all` those that every member does.
    """

    ensemble: Rate
    best: Rate
    any: Rate
    all: Rate


@dataclass(frozen=True)
class Diversity:
    """The record in diversity.json, of an ensemble of N members.

    Attributes:
        run_id: of its spec.
        spec: see `DiversitySpec`.
        members: N.
        n: images used.
        index: positions of the images that every member classifies correctly; all below but `clean` is on them.
        accuracy: of each member, and last of the ensemble, over all n.
        clean: bounds over all n.
        transfer: N rows of N + 1: the share fooled of the column's member, or last the ensemble, by images made
            on the row's member; by any restart.
        worst: N + 1 shares fooled by images made on any other member (of the ensemble: on any).
        attacked: N bounds, under the attack on each member.
        confusion: N x N, L[i][j]: the mean cross-entropy of member j for the target's class on images whose
            features in member i are those of the target; high if j does not use the features that i uses.
        diversity: N x N, the mean of L[i][j] and L[j][i].
        cosine: N x N, the mean cosine of two members' gradients in the image.
        distillation: how the images of `confusion` were made, and the layers drawn.
        cost: of the attacks, the gradients and all verdicts; passes of the distillation end at their layers.
        environment: versions, device, commit.
        flags: reasons to doubt all this.
    """

    run_id: str
    spec: DiversitySpec
    members: Positive
    n: Positive
    index: Sequence[Count]
    accuracy: Sequence[Rate]
    clean: Bounds
    transfer: Sequence[Sequence[Rate]]
    worst: Sequence[Rate]
    attacked: Sequence[Bounds]
    confusion: Sequence[Sequence[float]]
    diversity: Sequence[Sequence[float]]
    cosine: Sequence[Sequence[float]]
    distillation: Mapping[str, Any]
    cost: Cost
    environment: Environment = field(default_factory=dict)
    flags: Sequence[Flag] = ()
    format: Format = FORMAT

    @property
    def between(self) -> float:
        """The mean of `transfer` over pairs of different members."""
        return _off_diagonal([[rate.value for rate in row[: self.members]] for row in self.transfer])

    @property
    def alignment(self) -> float:
        """The mean of `cosine` over pairs of different members."""
        return _off_diagonal(self.cosine)

    @property
    def apartness(self) -> float:
        """The mean of `diversity` over pairs of different members."""
        return _off_diagonal(self.diversity)

    def to_json(self) -> dict[str, Any]:
        """Return the record as diversity.json holds it, `format` first."""
        kept = [f.name for f in fields(self) if f.name != "format"]
        return {"format": self.format, **json.loads(dumps({name: getattr(self, name) for name in kept}))}

    @classmethod
    def from_json(cls, body: Any, name: str = "this record") -> Diversity:
        """Return the record of a parsed diversity.json; UsageError if it is invalid."""
        check_format(body, name)
        return build(cls, body, name)

    def faults(self) -> Iterator[str]:
        """Yield contradictions in the record."""
        n = self.members
        square = (self.confusion, self.diversity, self.cosine)
        rows = {
            len(self.transfer),
            len(self.attacked),
            *map(len, square),
            *(len(row) for matrix in square for row in matrix),
        }
        if rows != {n} or {len(self.accuracy), len(self.worst), *map(len, self.transfer)} != {n + 1}:
            yield f"has tables that are not of its {n} members"


def _off_diagonal(table: Sequence[Sequence[float]]) -> float:
    cells = [value for row, values in enumerate(table) for column, value in enumerate(values) if row != column]
    return sum(cells) / len(cells)
