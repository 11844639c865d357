"""Nets given as Python code: `module:factory` and `file.py:factory`. Loading them runs that code.

Whether a string may do so is decided before (`robustkit.models.allowed_paths`).
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from robustkit.core.errors import RobustkitError, UsageError, did_you_mean, error_summary, expand_path
from robustkit.models.options import Options
from robustkit.models.sources.built import Built
from robustkit.models.sources.factory import is_factory
from robustkit.models.sources.kinds import no_such_kind
from robustkit.models.strings import FILE, ModelString
from robustkit.models.weights.files import WeightsFile
from robustkit.registry.code_files import read_source, running
from robustkit.registry.imports import own_imports, own_imports_of_module


def build(spec: ModelString, options: Options, weights: WeightsFile | None) -> Built:
    """Return what the factory returns when called with the query's other fields.

    The code is identified by the text of its own file and of those that it imports from its folder or package.

    Raises:
        UsageError: The code cannot be imported, has no such factory, or the factory is none of nets, fails or
            returns no net.
    """
    keywords = dict(options.keywords)
    if spec.kind == FILE:
        path = expand_path(spec.source).absolute()
        source, imported = read_source(path), own_imports(path, path.parent)
        with running(path) as module:
            net = _call(spec, getattr(module, spec.name, None), keywords)
        arch, identity = f"{path}:{spec.name}", dict[str, object](factory=spec.name)
    else:
        module = _import(spec)
        source = _text(module)
        file = getattr(module, "__file__", None)  # absent from modules that are built in
        # The factory is called first: what is refused needs no look at a package's hundreds of files.
        net = _call(spec, getattr(module, spec.name, None), keywords)
        imported = own_imports_of_module(spec.source, Path(file)) if file else {}
        arch, identity = spec.arch, dict[str, object](factory=spec.arch)
    if imported:
        identity["imports"] = {name: _sha256(file.read_bytes()) for name, file in imported.items()}
    num_classes = keywords.get("num_classes", getattr(net, "num_classes", None))
    return Built(
        net=net,
        arch=arch,
        identity={**identity, **keywords, "code": _sha256(source.encode())},
        num_classes=num_classes if isinstance(num_classes, int) else None,
    )


def _import(spec: ModelString) -> ModuleType:
    try:
        return importlib.import_module(spec.source)
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and f"{spec.source}.".startswith(f"{error.name}."):
            raise _not_found(spec) from error
        raise UsageError(
            f"importing {spec.source!r} failed with {error_summary(error)}: correct it first."
        ) from error


def _not_found(spec: ModelString) -> UsageError:
    """Return the error for a missing module; it names no package to install, because anyone may own that name."""
    file = Path(*spec.source.split(".")).with_suffix(".py")
    if file.is_file():
        return UsageError(
            f"model {spec.arch!r} names a module that Python does not find: did you mean './{file}:{spec.name}'?"
        )
    return no_such_kind(spec)


def _call(spec: ModelString, factory: object, keywords: dict[str, object]) -> Callable[..., object]:
    if not callable(factory):
        what = "has no factory" if factory is None else f"has a {type(factory).__name__}, not a function, named"
        raise UsageError(f"{spec.source!r} {what} {spec.name!r}: write the name of a function that builds a net.")
    if not is_factory(factory):
        raise UsageError(
            f"{spec.arch!r} is neither a torch.nn.Module class nor a function of yours that builds a net, and is "
            "not called: write such a function in a file, as ./net.py:factory."
        )
    _check_keywords(spec, factory, keywords)
    try:
        net: object = factory(**keywords)
    except RobustkitError:
        raise
    except (Exception, SystemExit) as error:
        raise UsageError(f"factory {spec.arch!r} failed with {error_summary(error)}: correct it first.") from error
    if not callable(net):
        raise UsageError(
            f"factory {spec.arch!r} returned an object of type {type(net).__name__}: return a torch.nn.Module or "
            "a function on images."
        )
    return net


def _check_keywords(spec: ModelString, factory: Callable[..., object], keywords: dict[str, object]) -> None:
    try:
        signature = inspect.signature(factory)
    except (TypeError, ValueError):
        return
    parameters = signature.parameters.values()
    known = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        for name in keywords:
            if name not in known and known:
                raise did_you_mean(f"field of {spec.arch}", name, known)
            if name not in known:
                raise UsageError(f"factory {spec.arch!r} takes no fields: leave out {name}=.")
    try:
        signature.bind(**keywords)
    except TypeError as error:
        raise UsageError(
            f"factory {spec.arch!r} cannot be called ({error}): write {spec.arch}?NAME=VALUE."
        ) from error


def _text(module: ModuleType) -> str:
    try:
        return inspect.getsource(module)
    except (OSError, TypeError):
        return ""


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
