"""Modules that robustbench imports for parts of it that are not used here, where they are not installed.

robustbench 1.1.1 imports `pkg_resources`, which current versions of setuptools lack, and `autoattack`, which PyPI
lacks. Placeholders are in `sys.modules` only while robustbench is imported.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType


@contextmanager
def placeholders() -> Iterator[None]:
    """Have a placeholder of each module that is not installed, in the body."""
    added = []
    for module in (_pkg_resources(), *_autoattack()):
        name = module.__name__
        if name not in sys.modules and (name.partition(".")[0] in added or importlib.util.find_spec(name) is None):
            sys.modules[name] = module
            added.append(name)
    try:
        yield
    finally:
        for name in added:
            sys.modules.pop(name, None)


def _pkg_resources() -> ModuleType:
    module = ModuleType("pkg_resources")
    vars(module)["resource_filename"] = _resource_filename
    return module


def _resource_filename(name: str, path: str) -> str:
    """Return the path of a file beside a module."""
    return str(Path(str(sys.modules[name].__file__)).parent / path)


def _autoattack() -> tuple[ModuleType, ModuleType]:
    package, state = ModuleType("autoattack"), ModuleType("autoattack.state")
    vars(package).update(AutoAttack=None, state=state)
    vars(state).update(EvaluationState=None)
    return package, state
