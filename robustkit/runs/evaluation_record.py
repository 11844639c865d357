"""The report of an evaluation, to and from JSON. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from robustkit.core.flags import Flag
from robustkit.core.schema import FORMAT, Positive, build, check_format
from robustkit.runs.distances import Minimum
from robustkit.runs.report_parts import Audit, Cost, Curve, Draws, Outcome, Passes, Rate, Stage, Stop, Strictness
from robustkit.runs.spec import Environment, Format, RunSpec, dumps

AUDIT_BROKE = "audit-broke"
CHANCE = "chance-accuracy"


@dataclass(frozen=True)
class Report:
    """The record of a finished run; the fields are those of report.json.

    `flags` were raised; `passed` are the results of the other checks, or why they were not measured. `checks` is
    their cost, which is part of the clean stage, the first of `stages`. `curve` and `audit` exist if they were
    requested, `draws` for a random model, `stopped` if the run ended early, `strictness` if the suite has arms,
    `minimum` if its threat is a minimum norm. `files` holds the sha256 of the other files of the run.
    `adversarial` (not in the file) are the fooling images as a mapping of `index` (M), `x` (M C H W) and `y` (M)
    if the run was started from Python.
    """

    run_id: str
    spec: RunSpec
    n: Positive
    clean_accuracy: Rate
    robust_accuracy: Rate
    stages: Sequence[Stage]
    cost: Cost
    flags: Sequence[Flag]
    verdicts: Sequence[Outcome]
    environment: Environment
    files: Mapping[str, str] = field(default_factory=dict)
    passed: Sequence[Flag] = field(default_factory=list)
    curve: Curve | None = None
    audit: Audit | None = None
    draws: Draws | None = None
    checks: Passes | None = None
    stopped: Stop | None = None
    minimum: Minimum | None = None
    strictness: Strictness | None = None
    format: Format = FORMAT
    adversarial: Mapping[str, Any] | None = field(default=None, compare=False, repr=False)

    def to_json(self) -> dict[str, Any]:
        """Return the record as in report.json, `format` first."""
        return {"format": self.format, **json.loads(dumps(self._body()))}

    def text(self) -> Iterator[str]:
        """Yield the same as text, in pieces, because the whole takes much memory if there are many images."""
        yield f'{{\n  "format": {self.format}'
        for name, value in sorted(self._body().items()):
            yield f',\n  "{name}": '
            if name == "verdicts":
                yield "["
                for number, verdict in enumerate(value):
                    yield f"{',' if number else ''}\n    {dumps(verdict)}"
                yield "\n  ]"
            else:
                yield dumps(json.loads(dumps(value)), indent=2).replace("\n", "\n  ")
        yield "\n}\n"

    def _body(self) -> dict[str, Any]:
        names = ("curve", "audit", "draws", "checks", "stopped", "strictness", "minimum")
        absent = {name for name in names if getattr(self, name) is None}
        left_out = {"adversarial", "format"} | absent
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in left_out}

    def with_curve(self, curve: Curve, flags: Sequence[Flag]) -> Report:
        """Return the same run with its curve, and the flags of its search."""
        return replace(self, curve=curve, flags=[*self.flags, *flags])

    def with_audit(self, audit: Audit) -> Report:
        """Return the same run with an audit in the place of any earlier one, and a flag if it broke an image."""
        flags = [flag for flag in self.flags if flag.code != AUDIT_BROKE]
        if audit.broke:
            flags.append(
                Flag(
                    AUDIT_BROKE,
                    "warning",
                    len(audit.broke),
                    f"AutoAttack broke this many of {len(audit.audited)} images that were robust to the suite",
                    "run --suite rapid+autoattack, and report its result",
                )
            )
        return replace(self, audit=audit, flags=flags)

    @classmethod
    def from_json(cls, body: Any, name: str = "this report") -> Report:
        """Return the report of a parsed report.json; `name` is its name in errors.

        Raises:
            UsageError: it is not a report, has another format, or contradicts itself.
        """
        check_format(body, name)
        return build(cls, body, name)

    def faults(self) -> Iterator[str]:
        """Yield contradictions in the record."""
        if len(self.verdicts) != self.n:
            yield f"has {len(self.verdicts)} verdicts of {self.n} images"
        if self.curve and len(self.curve.distances) != self.n:
            yield f"has {len(self.curve.distances)} distances in its curve for {self.n} images"
        if (self.minimum is not None) != self.spec.minimal:
            yield f"has threat {self.spec.threat} and {'no ' * (self.minimum is None)}minimum norms"
        if self.minimum and len(self.minimum.distances) != self.n:
            yield f"has {len(self.minimum.distances)} minimum norms for {self.n} images"

    def contradictions(self) -> Iterator[str]:
        """Yield contradictions between the verdicts and the rest."""
        right = sum(verdict.attack != "clean" for verdict in self.verdicts)
        robust = sum(verdict.robust for verdict in self.verdicts)
        for what, rate, hits in (("clean", self.clean_accuracy, right), ("robust", self.robust_accuracy, robust)):
            if not rate.is_of(hits, self.n):
                yield f"a {what} accuracy {rate.value} ({rate.low} – {rate.high}) but {hits} of {self.n} verdicts"
        indices = [verdict.index for verdict in self.verdicts]
        if indices != sorted(set(indices)) or indices[-1] >= self.spec.data["n"]:
            yield f"verdicts that are not of {self.spec.data['n']} images in order"
        if any(verdict.robust != (verdict.attack is None) for verdict in self.verdicts):
            yield "a verdict that does not fit its attack"
