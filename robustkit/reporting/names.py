"""What a run's stages are called where they stand beside each other."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from robustkit.registry.decorators import ORIGIN, stage_name
from robustkit.runs.evaluation_record import Report

# The fields that say most of an attack, the best first. A record's own order is lost in its file.
TELLING = ("loss", "steps", "queries", "targets")


def data_name(string: object) -> str:
    """Return what to call data in a table: its file, folder or set, without the folders above and the query."""
    return re.split(r"\?(?=[A-Za-z_]\w*=)", str(string))[0].rpartition("/")[2]


def stage_names(report: Report) -> list[str]:
    """Return the stages' attacks in order; those of one name with the field that tells them apart.

    `pgd(steps=1)` and `pgd(steps=5)`, written as `--suite` reads them; where no field does, `pgd #1` and `pgd #2`.
    """
    names = [stage.attack for stage in report.stages]
    suite = _records(report)
    found = list(names)
    for name in set(names):
        places = [place for place, other in enumerate(names) if other == name]
        if len(places) > 1:
            marks = _marks([suite[place] for place in places])
            for place, mark in zip(places, marks, strict=True):
                found[place] = f"{name}{mark}"
    return found


def _records(report: Report) -> list[Mapping[str, Any]]:
    """Return the record of each stage's attack, an empty one of the clean pass; spare ones may have no stage."""
    found: list[Mapping[str, Any]] = [{}]
    for record in report.spec.suite:
        if len(found) < len(report.stages) and stage_name(record) == report.stages[len(found)].attack:
            found.append(record)
    return found + [{}] * (len(report.stages) - len(found))


def _marks(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return for each of these attacks of one name what is put behind it."""
    telling = [field for field in TELLING if field in records[0]]
    singles = [(field,) for field in [*telling, *sorted(records[0].keys() - {*telling, *ORIGIN})]]
    for names in [*singles, *itertools.combinations(telling, 2)]:
        values = [[written(record.get(name)) for name in names] for record in records]
        if len(set(map(tuple, values))) == len(values):
            firsts = [value[0] for value in values]
            # Where the first field is enough the second is left out.
            shown = [names if firsts.count(value[0]) > 1 else names[:1] for value in values]
            pairs = [zip(some, value, strict=False) for some, value in zip(shown, values, strict=True)]
            return [f"({','.join(f'{name}={text}' for name, text in pair)})" for pair in pairs]
    return [f" #{number}" for number in range(1, len(records) + 1)]


def written(value: Any) -> str:
    """Return a field's value as `--suite` reads it."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return value if isinstance(value, str) else repr(value)
