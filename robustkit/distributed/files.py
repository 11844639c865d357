"""Files that model strings name: sent to machines that lack them, once each, and kept there under their hash."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from filelock import FileLock

from robustkit.core.errors import RunError
from robustkit.core.writing import subfolder, unlink_link, write
from robustkit.models.sources.from_run import PARTS
from robustkit.models.strings import ENSEMBLE, FOLDER, ModelString, joined
from robustkit.models.weights.files import INDEX, files_of_weights
from robustkit.runs import run_folder


@dataclass(frozen=True)
class Sent:
    """What the driver says of a file: the sha256 of its bytes, and these if they were asked for."""

    sha256: str
    content: bytes | None = None


# Asks the driver for a file by its path there: its hash alone, or its content.
Ask = Callable[[str, bool], Sent]


def files_of(string: str) -> Iterator[str]:
    """Yield the paths of the files that a model string names and that are here."""
    spec = ModelString.parse(string)
    if spec.kind == ENSEMBLE:
        for member in spec.members:
            yield from files_of(member)
    elif spec.kind == FOLDER:
        yield from (str(path) for name in PARTS if (path := _folder(spec) / name).is_file())
    elif spec.weights and Path(spec.weights).is_file():
        yield from map(str, files_of_weights(spec.weights))


def answer(path: str, whole: bool) -> Sent:
    """Return what a driver says of one of its files; RunError if it is no longer there."""
    try:
        state = os.stat(path)
        return Sent(_sha256(path, state.st_mtime_ns, state.st_size), Path(path).read_bytes() if whole else None)
    except OSError as error:
        raise RunError(f"cannot send {path} to workers: {error.strerror or error}; put it back.") from error


@lru_cache(maxsize=256)
def _sha256(path: str, *_: int) -> str:
    return run_folder.sha256(Path(path))


def here(string: str, files: tuple[str, ...], ask: Ask) -> str:
    """Return a model string of the driver's as one for this machine, where some of its `files` may be missing."""
    spec = ModelString.parse(string)
    if spec.kind == ENSEMBLE:
        spec = replace(spec, arch=joined([here(member, files, ask) for member in spec.members]))
    elif spec.kind == FOLDER:
        own = [path for path in files if Path(path).parent == _folder(spec)]
        if any(map(_missing, own)):
            _, sign, numbers = spec.arch.partition("#")
            spec = replace(spec, arch=f"{_linked(own, ask)}/{sign}{numbers}")
    elif spec.weights in files and _missing(str(spec.weights)):
        weights = Path(str(spec.weights))
        own = [path for path in files if Path(path).parent == weights.parent]
        # The files of an index are found beside it.
        sharded = weights.name.endswith(INDEX)
        spec = replace(
            spec, weights=str(_linked(own, ask) / weights.name if sharded else _fetched(str(weights), ask))
        )
    return str(spec)


def cache() -> Path:
    """Return where files that were sent are kept: $ROBUSTKIT_CACHE, else ~/.cache/robustkit, in `models`."""
    return Path(os.environ.get("ROBUSTKIT_CACHE") or "~/.cache/robustkit").expanduser() / "models"


def _fetched(path: str, ask: Ask) -> Path:
    """Return where a file of the driver's is on this machine, which has it from the first worker that asked."""
    sha256 = ask(path, False).sha256
    place = cache() / f"{sha256}{Path(path).suffix}"
    place.parent.mkdir(parents=True, exist_ok=True)
    with _lock(place):
        if not place.exists():
            content = ask(path, True).content or b""
            if hashlib.sha256(content).hexdigest() != sha256:
                raise RunError(f"{path} changed while it was sent to workers; start again when it no longer does.")
            write(place, content)
    return place


def _linked(paths: list[str], ask: Ask) -> Path:
    """Return a folder on this machine with these files of the driver's under their names."""
    found = {Path(path).name: _fetched(path, ask) for path in paths}
    content = "".join(f"{name} {place.name}\n" for name, place in sorted(found.items()))
    name = f"run-{hashlib.sha256(content.encode()).hexdigest()}"
    with _lock(cache() / name):
        run = subfolder(cache(), name)
        for name, place in found.items():
            if not (run / name).exists():
                (run / name).symlink_to(place.absolute())
    return run


def _lock(place: Path) -> FileLock:
    lock = place.with_name(f"{place.name}.lock")
    unlink_link(lock)
    return FileLock(lock)


def _missing(path: str) -> bool:
    return not Path(path).exists()


def _folder(spec: ModelString) -> Path:
    return Path(spec.arch.partition("#")[0])
