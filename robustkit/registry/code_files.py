"""The user's own Python files: run by their path, and identified by their text. Imports no torch.

`FILE.py:NAME` names a class or function in a file. Whether a file may be run is decided by the caller: a name that
the user types is the user's own, one that is read from a record is not (`robustkit.models.allowed_paths`).
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib
import inspect
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

from robustkit.core.errors import UsageError, error_summary, expand_path
from robustkit.registry.imports import own_imports

_REFERENCE = re.compile(r"(.+\.py):([^\W\d]\w*)", re.DOTALL)
# Modules that the user's files have imported from their own folders.
_helpers: set[str] = set()
# Modules of files by path and hash, so that the same text gives the same class each time.
_loaded: dict[tuple[Path, str], ModuleType] = {}


def is_reference(name: str) -> bool:
    """Return whether a name is `FILE.py:NAME`."""
    return _REFERENCE.fullmatch(name) is not None


def split_reference(name: str) -> tuple[Path, str]:
    """Return the absolute path and the class or function of `FILE.py:NAME`."""
    match = _REFERENCE.fullmatch(name)
    if match is None:
        raise UsageError(f"{name!r} is no class or function of a file: write FILE.py:NAME.")
    return expand_path(match[1]).absolute(), match[2]


def absolute_reference(name: str) -> str:
    """Return `FILE.py:NAME` with an absolute path; other names as they are."""
    if not is_reference(name):
        return name
    path, attribute = split_reference(name)
    return f"{path}:{attribute}"


def load_reference(name: str) -> Any:
    """Return the class or function that `FILE.py:NAME` names, after running the file.

    Raises:
        UsageError: if the file is not there, cannot be read, fails, or has no such name.
    """
    path, attribute = split_reference(name)
    key = path, file_sha256(path)
    if key not in _loaded:
        with running(path) as module:
            _loaded[key] = module
            for value in vars(module).values():
                if inspect.isclass(value) and value.__module__ == module.__name__ and hasattr(value, "info"):
                    value.__reduce__ = _reduce  # type: ignore[method-assign]
    module = _loaded[key]
    if not hasattr(module, attribute):
        own = [word for word, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__]
        known = f"; it defines {', '.join(own)}" if own else ""
        raise UsageError(f"'{path}' has no class or function {attribute!r}{known}.")
    return getattr(module, attribute)


def loaded_files() -> list[Path]:
    """Return the absolute paths of the files that `load_reference` has run in this process."""
    return list(dict.fromkeys(path for path, _ in _loaded))


def reference_of(thing: Any) -> str | None:
    """Return the `FILE.py:NAME` by which `load_reference` has loaded a class or function; None for others."""
    for (path, _), module in _loaded.items():
        name = getattr(thing, "__qualname__", "")
        if getattr(thing, "__module__", "") == module.__name__ and getattr(module, name, None) is thing:
            return f"{path}:{name}"
    return None


def _reduce(self: Any) -> tuple[Any, ...]:
    """Let an object of a file's class be pickled for a worker, which runs the file to load it."""
    fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
    return _restored, (reference_of(type(self)), fields)


def _restored(reference: str, fields: Mapping[str, Any]) -> Any:
    return load_reference(reference)(**fields)


@contextmanager
def running(path: Path) -> Iterator[ModuleType]:
    """Run a file; its folder can be imported from inside this context, as if the file were run as a script.

    Raises:
        UsageError: if it cannot be read, or fails.
    """
    source = read_source(path)
    with _importable(path.parent, own_imports(path, path.parent)):
        yield _run(path, source)


def read_source(path: Path) -> str:
    """Return the text of a Python file; UsageError if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise UsageError(f"there is no file '{path}': check the path before ':'.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"'{path}' cannot be read as Python code ({error}): write a .py file.") from error


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's text, and of the files that it imports from its folder, if there are any."""
    return joined_sha256(read_source(path).encode(), own_imports(path, path.parent))


def joined_sha256(source: bytes, imported: Mapping[str, Path]) -> str:
    """Return the SHA-256 of a text and of the named files beside it; of the text alone where there are none."""
    digest = hashlib.sha256(source)
    for name, file in sorted(imported.items()):
        digest.update(f"\n{name} {hashlib.sha256(file.read_bytes()).hexdigest()}".encode())
    return digest.hexdigest()


def plain_values(function: Callable[..., Any]) -> dict[str, str]:
    """Return the numbers and texts that a function closes over, or an object holds, as text."""
    values: Mapping[str, Any] = {}
    if inspect.isfunction(function):
        values = inspect.getclosurevars(function).nonlocals
    elif not inspect.isroutine(function):
        values = getattr(function, "__dict__", {})
    return {
        str(name): repr(value) for name, value in values.items() if isinstance(value, bool | int | float | str)
    }


@functools.lru_cache(maxsize=1024)
def code_of(thing: Any) -> dict[str, str]:
    """Return how a class or function outside of robustkit is found and identified, as fields of its record.

    `code` is the SHA-256 of its file and of the files that it imports from its folder, or of its own text if it is
    in no file (a notebook). `string` is `FILE.py:NAME`, which is not part of a run's identity. Empty for
    robustkit's own.
    """
    name = str(thing.__module__)
    if name.partition(".")[0] == "robustkit":
        return {}
    module = sys.modules.get(name)
    file = getattr(module, "__file__", None)
    if file is None:
        return {"code": hashlib.sha256(_text(thing).encode()).hexdigest()}
    found = next((key for key, value in _loaded.items() if value is module), None)
    path, sha256 = found or (Path(file).absolute(), file_sha256(Path(file).absolute()))
    return {"code": sha256, "string": f"{path}:{thing.__qualname__}"}


def _text(thing: Any) -> str:
    try:
        return inspect.getsource(thing)
    except (OSError, TypeError):
        return str(thing.__qualname__)


def _run(path: Path, source: str) -> ModuleType:
    """Return the module of a file, run afresh, without leaving a bytecode cache beside it."""
    name = f"robustkit_file_{hashlib.sha256(str(path).encode()).hexdigest()[:16]}"
    spec = spec_from_file_location(name, path)
    if spec is None:
        raise UsageError(f"'{path}' cannot be imported: write a .py file.")
    module = module_from_spec(spec)
    # Dataclasses look their module up by its name.
    sys.modules[name] = module
    try:
        exec(compile(source, str(path), "exec"), module.__dict__)
    # A script without a main guard ends in SystemExit.
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise UsageError(f"'{path}' failed with {error_summary(error)}: correct it first.") from error
    return module


@contextmanager
def _importable(folder: Path, imported: Mapping[str, Path]) -> Iterator[None]:
    """Let a file import those beside it afresh, as it could when run as a script.

    A module that an earlier file imported under the same name may be another one, or one that has changed.
    """
    for name in _helpers & imported.keys():
        sys.modules.pop(name, None)
    importlib.invalidate_caches()
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        sys.dont_write_bytecode = before
        _helpers.update(name for name, file in imported.items() if _is_from(sys.modules.get(name), file))


def _is_from(module: ModuleType | None, file: Path) -> bool:
    return getattr(module, "__file__", None) == str(file)
