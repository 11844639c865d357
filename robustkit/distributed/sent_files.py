"""Files that model strings and plug-ins name: sent to machines that lack them, and kept there under their hash."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from robustkit.core.errors import RunError, relocated
from robustkit.core.writing import subfolder, unlink_link, write
from robustkit.distributed.pool import Handle, WorkerPool
from robustkit.models.sources.from_run import PARTS, folder_of
from robustkit.models.strings import ENSEMBLE, FILE, FOLDER, ModelString
from robustkit.models.weights.files import files_of_weights
from robustkit.registry.code_files import loaded_files, split_reference
from robustkit.registry.imports import own_imports
from robustkit.registry.strings import defense_files


@dataclass(frozen=True)
class SentFile:
    """A file or folder that a string of the driver's names, and what else is needed beside it.

    Attributes:
        path: the absolute path in the driver.
        names: paths by which strings name it: absolute, and relative to the driver's folder.
        folder: the absolute path of the folder that has all its parts.
        parts: the SHA-256 and the content of each file, by its path below that folder.
    """

    path: str
    names: tuple[str, ...]
    folder: str
    parts: Mapping[str, tuple[str, Handle[bytes]]]

    @classmethod
    def read(cls, pool: WorkerPool, path: Path, folder: Path, files: list[Path]) -> SentFile:
        """Return a file or folder with the content of its `files`, all of which are below `folder`.

        Raises:
            RunError: a file cannot be read.
        """
        parts = {}
        for file in files:
            try:
                content = file.read_bytes()
            except OSError as error:
                raise RunError(
                    f"cannot send {file} to workers: {error.strerror or error}; put it back."
                ) from error
            name = file.relative_to(folder).as_posix()
            parts[name] = hashlib.sha256(content).hexdigest(), pool.share(content, str(file))
        names = str(path), os.path.relpath(path)
        return cls(str(path), names, str(folder), parts)

    def place(self) -> None:
        """Have this process find the file where the driver has it, or in this machine's cache if it is missing."""
        here = self.path
        if not all(map(_exists, (os.path.join(self.folder, name) for name in self.parts))):
            here = os.path.normpath(self._copy() / os.path.relpath(self.path, self.folder))
        relocated.update(dict.fromkeys(self.names, here))

    def _copy(self) -> Path:
        """Return a folder in the cache that has the parts under their names."""
        listed = "".join(f"{name} {sha256}\n" for name, (sha256, _) in sorted(self.parts.items()))
        name = f"files-{hashlib.sha256(listed.encode()).hexdigest()}"
        cache_folder().mkdir(parents=True, exist_ok=True)
        # One worker of a machine writes while the others wait.
        with _lock(cache_folder() / name):
            copy = subfolder(cache_folder(), name)
            for part, (sha256, content) in self.parts.items():
                kept = cache_folder() / f"{sha256}{Path(part).suffix}"
                if not kept.exists():
                    write(kept, content.get())
                if not (copy / part).exists():
                    (copy / part).parent.mkdir(parents=True, exist_ok=True)
                    (copy / part).symlink_to(kept.absolute())
        return copy


def send_files(pool: WorkerPool, string: str) -> tuple[SentFile, ...]:
    """Return the files that a model string names, and the plug-in files that this process has run.

    Empty if the workers of the pool see the driver's files. The files are code and weights that the driver itself
    uses; workers load them by the same rules.
    """
    return () if pool.shares_files else tuple(_files(pool, string))


def _files(pool: WorkerPool, string: str) -> Iterator[SentFile]:
    for path in loaded_files():
        yield _code_file(pool, path)
    for spec in _parts(string):
        if spec.kind == FOLDER:
            folder = folder_of(spec).absolute()
            files = [folder / name for name in PARTS if (folder / name).is_file()]
            yield SentFile.read(pool, folder, folder, files)
        elif spec.kind == FILE:
            yield _code_file(pool, split_reference(spec.arch)[0])
        for reference in defense_files(spec.options.get("defense", "")):
            yield _code_file(pool, split_reference(reference)[0])
        if spec.weights and Path(spec.weights).is_file():
            path = Path(spec.weights).absolute()
            yield SentFile.read(pool, path, path.parent, files_of_weights(path))


def _parts(string: str) -> Iterator[ModelString]:
    spec = ModelString.parse(string)
    if spec.kind == ENSEMBLE:
        for member in spec.members:
            yield from _parts(member)
    else:
        yield spec


def _code_file(pool: WorkerPool, path: Path) -> SentFile:
    return SentFile.read(pool, path, path.parent, [path, *own_imports(path, path.parent).values()])


def cache_folder() -> Path:
    """Return where files that were sent are kept: $ROBUSTKIT_CACHE, else ~/.cache/robustkit, in `models`."""
    return Path(os.environ.get("ROBUSTKIT_CACHE") or "~/.cache/robustkit").expanduser() / "models"


def _lock(place: Path) -> FileLock:
    lock = place.with_name(f"{place.name}.lock")
    unlink_link(lock)
    return FileLock(lock)


def _exists(path: str) -> bool:
    return Path(path).exists()
