"""Short names of data and of the stages of a run."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from robustkit.registry.decorators import ORIGIN, stage_name
from robustkit.runs.evaluation_record import Report

# Fields that distinguish attacks best, in order of preference; a JSON record does not keep the fields' order.
DISTINGUISHING_FIELDS = ("loss", "steps", "queries", "targets")


def data_name(string: object) -> str:
    """Return a data set's short name: its file, folder or set, without parent folders and query."""
    return re.split(r"\?(?=[A-Za-z_]\w*=)", str(string))[0].rpartition("/")[2]


def stage_names(report: Report) -> list[str]:
    """Return the names of the stages' attacks in order; equal names get the field in which they differ.

    Examples are `pgd(steps=1)` and `pgd(steps=5)`, as `--suite` reads them; if no field differs, `pgd #1` and
    `pgd #2`.
    """
    names = [stage.attack for stage in report.stages]
    suite = _records(report)
    unique = list(names)
    for name in set(names):
        indices = [index for index, other in enumerate(names) if other == name]
        if len(indices) > 1:
            suffixes = _suffixes([suite[index] for index in indices])
            for index, suffix in zip(indices, suffixes, strict=True):
                unique[index] = f"{name}{suffix}"
    return unique


def _records(report: Report) -> list[Mapping[str, Any]]:
    """Return the record of each stage's attack, an empty one for the clean stage.

    Conditional attacks of the suite may have no stage.
    """
    found: list[Mapping[str, Any]] = [{}]
    for record in report.spec.suite:
        if len(found) < len(report.stages) and stage_name(record) == report.stages[len(found)].attack:
            found.append(record)
    return found + [{}] * (len(report.stages) - len(found))


def _suffixes(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return for each of these attacks of one name the suffix that distinguishes it."""
    preferred = [field for field in DISTINGUISHING_FIELDS if field in records[0]]
    singles = [(field,) for field in [*preferred, *sorted(records[0].keys() - {*preferred, *ORIGIN})]]
    for names in [*singles, *itertools.combinations(preferred, 2)]:
        values = [[written(record.get(name)) for name in names] for record in records]
        if len(set(map(tuple, values))) == len(values):
            firsts = [value[0] for value in values]
            # The second field is left out where the first is enough.
            shown = [names if firsts.count(value[0]) > 1 else names[:1] for value in values]
            pairs = [zip(fields, value, strict=False) for fields, value in zip(shown, values, strict=True)]
            return [f"({','.join(f'{name}={text}' for name, text in pair)})" for pair in pairs]
    return [f" #{number}" for number in range(1, len(records) + 1)]


def written(value: Any) -> str:
    """Return a field's value as `--suite` reads it."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return value if isinstance(value, str) else repr(value)
