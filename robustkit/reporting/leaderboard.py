"""The leaderboard: several models under the same attacks, the most robust first, as in leaderboard.json."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from robustkit.core.errors import UsageError
from robustkit.core.flags import Flag
from robustkit.core.schema import FORMAT
from robustkit.reporting.paired import compare
from robustkit.runs.evaluation_record import Report
from robustkit.runs.report_parts import Rate
from robustkit.runs.spec import dumps

# The title of the models with flags of level warning or error.
FLAGGED_TITLE = "ranked separately: flags say that these numbers may be too high"
# Two neighbours with a p of at least this are not distinguished.
SIGNIFICANCE = 0.05
RULE = f"where p is {SIGNIFICANCE} or more, these images do not show which of the two is more robust"


@dataclass(frozen=True)
class PairedDifference:
    """Robust accuracy of the next model above minus that of this one, on the images of both.

    Attributes:
        value: the difference, a share.
        low: lower end of Newcombe's 95 % interval for paired shares.
        high: upper end.
        p: of McNemar's exact two-sided test of this pair, without a correction for multiple comparisons.
        n: number of images that both runs have.
    """

    value: float
    low: float
    high: float
    p: float
    n: int


@dataclass(frozen=True)
class Row:
    """One model.

    Attributes:
        rank: from 1, among the models with or without flags; equal robust accuracies have the same rank.
        behind: difference to the next model above; None for the first model of a section, and if the two runs did
            not have the same images. (The name is a key of format 1.)
    """

    rank: int
    name: str
    model: str
    folder: str
    run_id: str
    n: int
    clean_accuracy: Rate
    robust_accuracy: Rate
    behind: PairedDifference | None
    gradients_per_image: float
    forwards_per_image: float
    flags: Sequence[Flag]

    @property
    def warnings(self) -> list[str]:
        """The codes of its flags of level warning or error; with any, the model is ranked separately."""
        return warning_codes(self.flags)


@dataclass(frozen=True)
class Failure:
    """A model of the list that could not be loaded or evaluated, with the reason."""

    name: str
    model: str
    reason: str


@dataclass(frozen=True)
class Leaderboard:
    """The content of leaderboard.json. `id` depends on data, threat, suite and seed, not on the models."""

    id: str
    data: Mapping[str, Any]
    threat: str
    suite: Sequence[Mapping[str, Any]]
    seed: int
    rows: Sequence[Row]
    failed: Sequence[Failure]
    environment: Mapping[str, Any]
    format: int = FORMAT

    @classmethod
    def of(
        cls, id: str, found: Sequence[tuple[str, str, Report]], failed: Sequence[tuple[str, str, str]]
    ) -> Leaderboard:
        """Return the leaderboard of finished runs.

        Models with flags of level warning or error come last, with ranks of their own. Equal robust accuracies
        share a rank and are ordered by clean accuracy.

        Args:
            id: the leaderboard's id.
            found: name, folder and report of each finished run, at least one.
            failed: name, model string and reason of each model that has no result.
        """
        order = sorted(
            found,
            key=lambda one: (
                bool(warning_codes(one[2].flags)),
                -one[2].robust_accuracy.value,
                -one[2].clean_accuracy.value,
                one[0],
            ),
        )
        first = order[0][2]
        parts = [
            [one for one in order if bool(warning_codes(one[2].flags)) == flagged] for flagged in (False, True)
        ]
        return cls(
            id=id,
            data=first.spec.data,
            threat=first.spec.threat,
            suite=first.spec.suite,
            seed=first.spec.seed,
            rows=[row for part in parts for row in _ranked(part)],
            failed=[Failure(*one) for one in failed],
            environment=first.environment,
        )

    @property
    def sections(self) -> list[tuple[str, list[Row]]]:
        """The models without warnings, and those with warnings under a title; empty sections are left out."""
        parts = [("", [row for row in self.rows if not row.warnings])]
        parts += [(FLAGGED_TITLE, [row for row in self.rows if row.warnings])]
        return [(title, rows) for title, rows in parts if rows]

    def to_json(self) -> dict[str, Any]:
        """Return the record as leaderboard.json holds it, `format` first."""
        body = json.loads(dumps(self))
        return {"format": body.pop("format"), **body}


def warning_codes(flags: Sequence[Flag]) -> list[str]:
    """Return the codes of the flags of level warning or error."""
    return [flag.code for flag in flags if flag.warns]


def _ranked(found: Sequence[tuple[str, str, Report]]) -> list[Row]:
    """Return the rows of one section, in order."""
    rows: list[Row] = []
    above: Report | None = None
    for number, (name, folder, report) in enumerate(found, 1):
        tied = above is not None and above.robust_accuracy.value == report.robust_accuracy.value
        rows.append(
            Row(
                rank=rows[-1].rank if tied else number,
                name=name,
                model=report.spec.model["string"],
                folder=folder,
                run_id=report.run_id,
                n=report.n,
                clean_accuracy=report.clean_accuracy,
                robust_accuracy=report.robust_accuracy,
                behind=_difference(above, report) if above else None,
                gradients_per_image=report.cost.backwards / report.n,
                forwards_per_image=report.cost.forwards / report.n,
                flags=report.flags,
            )
        )
        above = report
    return rows


def _difference(above: Report, report: Report) -> PairedDifference | None:
    if above.spec.data["fingerprint"] != report.spec.data["fingerprint"]:
        return None
    try:
        found = compare(above, report)
    except UsageError:
        return None  # both runs stopped early and have no image in common
    return PairedDifference(found.difference, found.low, found.high, found.p, found.n)
