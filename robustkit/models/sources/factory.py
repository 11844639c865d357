"""What may be called to build a net: a class of nets, or a function of a module about nets."""

from __future__ import annotations

import functools
import inspect
import sys
from pathlib import Path
from types import ModuleType

from torch import nn

# Their functions load files, run programs and much else, but are no factories of nets.
_LIBRARIES = sys.stdlib_module_names | {"torch", "robustkit"}
_INSTALLED = {"site-packages", "dist-packages"}


def is_factory(value: object) -> bool:
    """Return whether a value may be called to build a net, without calling it.

    That is a subclass of `torch.nn.Module`, or a function written in Python outside of the standard library and
    torch; one of an installed package must be in a module that has nets. `functools.partial` objects and decorated
    functions are judged by the function inside.
    """
    while isinstance(value, functools.partial):
        value = value.func
    if inspect.isclass(value):
        return issubclass(value, nn.Module)
    inside = inspect.unwrap(value) if callable(value) else value
    home = sys.modules.get(inside.__module__) if inspect.isfunction(inside) else None
    if home is None or home.__name__.partition(".")[0] in _LIBRARIES:
        return False
    return not _is_installed(home) or _holds_nets(home)


def _is_installed(module: ModuleType) -> bool:
    return bool(_INSTALLED & set(Path(getattr(module, "__file__", None) or "").parts))


def _holds_nets(module: ModuleType) -> bool:
    """Return whether a module has torch.nn or a class of nets among its names, as one that builds nets has."""
    return any(
        value is nn or (inspect.isclass(value) and issubclass(value, nn.Module)) for value in vars(module).values()
    )
