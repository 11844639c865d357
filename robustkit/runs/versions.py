"""The versions that made each part of a resumed run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from robustkit.runs.environment import versions
from robustkit.runs.ledger import Ledger

MAKERS = ("robustkit", "torch")
NOTE = "parts"


def continued(parts: Sequence[Mapping[str, Any]], place: str) -> list[dict[str, Any]]:
    """Return the parts of a run, this process's part included.

    Args:
        parts: so far: where each started (`from`), and its versions.
        place: where this one starts, such as `step 30`.
    """
    here = versions()
    own = {name: here[name] for name in MAKERS}
    known = [dict(part) for part in parts]
    if known and all(known[-1].get(name) == number for name, number in own.items()):
        return known
    return [*known, {"from": place, **own}]


def record_part(ledger: Ledger) -> list[dict[str, Any]]:
    """Add this process to the parts of a run in its ledger if its versions differ; return all parts."""
    parts = continued(json.loads(ledger.read_note(NOTE) or "[]"), f"chunk {ledger.count()}")
    ledger.write_note(NOTE, json.dumps(parts))
    return parts
