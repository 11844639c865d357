"""Which code and paths a string may name that was read from a file.

A model string that the user typed on the command line, or passed in Python, is the user's own and runs the code
that it names. A string that is read from a report, a run folder or a list of models may come from another author
and runs none, unless the user passes `--trust-code`, or `trust_code=True` in Python. Imports no torch.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from robustkit.core.errors import UsageError
from robustkit.models.sources.source import find_source, is_own
from robustkit.models.strings import ENSEMBLE, FILE, FOLDER, MODULE, SOURCE, ModelString
from robustkit.registry.strings import defense_files

FLAG = "--trust-code"
# Prefixes of paths that are not on a disk: another machine, another program.
_ELSEWHERE = re.compile(r"[\\/]{2}|\w{2,}:")
_DEVICES = (("dev",), ("proc",), ("sys",))
# Files that a package's model source may run or unpickle. robustkit does neither with weights after `@`, and
# its own sources do neither unless they declare `runs_code`.
_CODE_FILE = re.compile(r"\.(py|pyc|pkl|pickle|joblib|dill|pt2?|pth|ckpt|bin|tar|npy)(?!\w)", re.IGNORECASE)
_PATH = re.compile(r"[/\\.~]|\w+:[/\\]")


def refuse_code(string: str, where: object) -> None:
    """Refuse a model string of a file that names Python code.

    Args:
        string: the model string.
        where: the file that it was read from, for the error message.

    Raises:
        UsageError: it names code, in a member of an ensemble too.
    """
    for code in _code_in(string):
        raise UsageError(
            f"{where} names Python code, {code!r}, which is not run because a file named it: give {FLAG} "
            "(trust_code=True in Python) if you trust the author of that file."
        )


def recorded_model(string: str, where: object, trust_code: bool) -> str:
    """Return the model string of a run's record if it may be loaded.

    Raises:
        UsageError: it names code that is not trusted, or files that are not on this machine's disks.
    """
    if not trust_code:
        refuse_code(string, where)
    for spec in _parts(string):
        path = spec.arch.partition("#")[0] if spec.kind == FOLDER else spec.weights
        if path is not None:
            check_path(path, where, "--model")
        for text in filter(_PATH.match, _texts(spec)):
            check_path(text, where, "--model")
    return string


def names_code(string: str) -> bool:
    """Return whether a model string names Python code itself."""
    return any(True for _ in _code_in(string))


def _code_in(string: str) -> Iterator[str]:
    """Yield the Python code and pickles that a model string names: as its nets, for its nets, and as defenses."""
    for spec in _parts(string):
        if spec.kind in (FILE, MODULE) or (spec.kind == SOURCE and find_source(spec.source).runs_code):
            yield spec.arch
        if spec.kind == SOURCE and not is_own(spec.source):
            yield from filter(_CODE_FILE.search, _texts(spec))
        yield from defense_files(spec.options.get("defense", ""))


def _texts(spec: ModelString) -> Iterator[str]:
    """Yield the arguments of a model source: the name of the net, and the values of the query without defenses."""
    if spec.kind == SOURCE:
        yield spec.name
        yield from (value for name, value in spec.options.items() if name != "defense")


def _parts(string: str) -> Iterator[ModelString]:
    """Yield the strings of single models that a string is made of."""
    spec = ModelString.parse(string)
    yield spec
    if spec.kind == ENSEMBLE:
        for member in spec.members:
            yield from _parts(member)


def check_path(path: str, where: object, flag: str) -> None:
    """Raise UsageError unless it is an absolute path on a disk, as all paths in records of robustkit are."""
    location = Path(os.path.normpath(path))
    # Of devices, /dev/shm is a disk in memory.
    devices = location.parts[1:2] in _DEVICES and location.parts[1:3] != ("dev", "shm")
    if "\0" in path or _ELSEWHERE.match(path) or devices or not location.is_absolute():
        raise UsageError(
            f"{where} names {path!r}, which is not the absolute path of a file on a disk of this machine: give "
            f"{flag} with its path here."
        )
