"""Attacks, techniques, recipes, defenses, methods and suites by name, found by walking the folders.

Imports no torch.

A file registers names made of its own stem: `fab.py` may hold `fab` and `fab-t`, `mi_fgsm.py` holds `mi-fgsm`,
`autoattack.py` holds `autoattack:apgd-ce`, `rapid.py` holds `rapid+autoattack`. A recipe may end in the stem
instead, as papers name theirs: `cwa.py` holds `ssa-cwa`. So one name imports one module, and lists, help pages
and spelling hints are read from the source text without importing any.
"""

from __future__ import annotations

from robustkit.registry.construction import make, make_again, make_method, make_technique, plain, spec
from robustkit.registry.decorators import Info, attack, defense, method, recipe, suite, technique
from robustkit.registry.entries import Entry, Field, catalog, describe, find
from robustkit.registry.fields import takes
from robustkit.registry.strings import (
    DEFAULT_SUITE,
    DRAWN,
    VIEWS,
    Suite,
    SuiteEntry,
    parse_attack,
    parse_defenses,
    parse_method,
    parse_suite,
    suite_text,
)

__all__ = [
    "DEFAULT_SUITE",
    "DRAWN",
    "VIEWS",
    "Entry",
    "Field",
    "Info",
    "Suite",
    "SuiteEntry",
    "attack",
    "catalog",
    "defense",
    "describe",
    "find",
    "make",
    "make_again",
    "make_method",
    "make_technique",
    "method",
    "parse_attack",
    "parse_defenses",
    "parse_method",
    "parse_suite",
    "plain",
    "recipe",
    "spec",
    "suite",
    "suite_text",
    "takes",
    "technique",
]
