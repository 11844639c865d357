"""Attacks, techniques, recipes, defenses, methods and suites by name. Imports no torch.

They come from the folders `attacks/` and `defenses/`, from installed packages (`registry.plugins`) and from files
that the user names (`registry.code_files`). Lists, help pages and spelling hints are read from the source text,
without importing a module; a name imports the one module that registers it.

In robustkit's own folders a file registers names made of its stem: `fab.py` has `fab` and `fab-t`, `mi_fgsm.py`
has `mi-fgsm`, `autoattack.py` has `autoattack:apgd-ce`, `rapid.py` has `rapid+autoattack`. A recipe may end in the
stem instead, as papers name theirs: `cwa.py` has `ssa-cwa`.
"""

from __future__ import annotations

from robustkit.registry.construction import from_record, make, make_method, make_technique, plain, spec
from robustkit.registry.decorators import Info, attack, defense, method, recipe, suite, technique
from robustkit.registry.entries import Entry, Field, catalog, describe, find
from robustkit.registry.fields import takes
from robustkit.registry.strings import parse_attack, parse_defenses, parse_method
from robustkit.registry.suites import DEFAULT_SUITE, DRAWN, VIEWS, Suite, SuiteEntry, parse_suite, suite_text

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
    "from_record",
    "make",
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
