"""`robustkit list NAME`: what an attack, technique, recipe, method, defense or suite does, and its fields."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from robustkit import registry
from robustkit.cli.streams import print_result

KINDS = ("attack", "technique", "recipe", "method", "defense", "suite")


def kinds_of(name: str) -> list[str]:
    """Return the kinds that have an entry of this name."""
    return [kind for kind in KINDS if name in registry.catalog(kind)]


def names() -> list[str]:
    """Return all names that `show` accepts."""
    return [name for kind in KINDS for name in registry.catalog(kind)]


def show(name: str, as_json: bool) -> int:
    """Print all entries of this name; return the exit code. Imports the module of the entry."""
    entries = [_facts(kind, name) for kind in kinds_of(name)]
    if as_json:
        print_result(json.dumps({name: entries}, indent=2))
        return 0
    for number, facts in enumerate(entries):
        head = [facts["name"], facts["kind"], " ".join(facts["norms"]), facts["paper"]]
        print_result("\n" * (number > 0) + "   ".join(part for part in head if part))
        if facts["fields"]:
            print_result(
                f"  {name}({','.join(f'{field}={_text(value)}' for field, value in facts['fields'].items())})"
            )
            width = max(map(len, facts["takes"]))
            print_result("\n".join(f"    {field:{width}}  {what}" for field, what in facts["takes"].items()))
        if facts["stands_for"]:
            print_result(f"  is {facts['stands_for']}")
        print_result(f"\n{facts['what']}")
    return 0


def _text(value: Any) -> str:
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def _facts(kind: str, name: str) -> dict[str, Any]:
    entry = registry.catalog(kind)[name]
    registered = registry.find(kind, name)
    fields = (
        dataclasses.fields(registered) if dataclasses.is_dataclass(registered) and not entry.info.family else ()
    )
    return {
        "name": name,
        "kind": kind,
        "norms": list(entry.info.norms),
        "paper": entry.info.paper,
        "fields": {field.name: registry.plain(field.default) for field in fields},
        "takes": {field.name: registry.takes(registered, field.name) for field in fields},
        "stands_for": registered() if kind == "recipe" else None,
        "what": "\n".join(part for part in (entry.summary, entry.detail) if part),
    }
