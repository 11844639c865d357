"""Which picture files a folder of class folders holds: those of torchvision's ImageFolder, without hidden ones."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from robustkit.core.errors import UsageError

# The suffixes of picture files that are read, and Pillow's names of their formats.
KINDS = ("jpg", "jpeg", "png", "webp", "ppm", "pgm", "bmp", "tif", "tiff", "gif")
FORMATS = ("JPEG", "PNG", "WEBP", "PPM", "BMP", "TIFF", "GIF")
# Names of the parts of a data set, such as val, test2017 or train_set.
_SPLIT = re.compile(
    r"(val|valid|validation|test|testing|eval|dev|train|training)([ _-]?(set|images|data|split))?\d*"
)
# Folders that systems and tools put beside data (those whose names begin with a dot apart).
_SYSTEM = ("__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN", "System Volume Information")
_NAMED = 3


@dataclass(frozen=True)
class Listing:
    """The pictures of a folder.

    Attributes:
        classes: the class folders, sorted by name.
        files: paths below the folder, class by class.
        labels: the class of each file, as its place in `classes`.
        hidden: hidden folders, and hidden files that are pictures by their names; none is in `files`.
        beside: pictures in the parent folder of the class folders.
    """

    classes: tuple[str, ...]
    files: list[str]
    labels: list[int]
    hidden: list[str]
    beside: list[str]

    @property
    def notes(self) -> tuple[str, ...]:
        """A sentence for each kind of file that was left out."""
        found = ((self.hidden, "hidden folders and files"), (self.beside, "pictures beside the class folders"))
        return tuple(f"left out {len(names)} {what}: {_some(names)}" for names, what in found if names)


def is_hidden(name: str) -> bool:
    """Return whether a file or folder of this name was created by a system or a tool and is not data."""
    return name.startswith(".") or name in _SYSTEM


def list_pictures(root: Path, *, nested: bool = False) -> Listing:
    """Return the pictures in the class folders of a folder.

    Args:
        root: the folder.
        nested: treat folders that look like the parts of a data set as classes.

    Raises:
        UsageError: a class folder is empty, a picture is no ordinary file, or the class folders are one level
            further down.
    """
    try:
        top = sorted(os.scandir(root), key=lambda entry: entry.name)
        folders = [entry.name for entry in top if entry.is_dir() and not is_hidden(entry.name)]
        hidden = [entry.name for entry in top if is_hidden(entry.name) and (entry.is_dir() or _kind(entry.name))]
        beside = [entry.name for entry in top if _kind(entry.name) and not is_hidden(entry.name)]
        found = {name: list(_walk(root, name, hidden)) for name in folders}
    except OSError as error:
        raise UsageError(
            f"{error.filename or root} cannot be listed ({error.strerror or error}); check its permissions."
        ) from error
    if not folders:
        what = f"{len(beside)} pictures but no folder" if beside else "no folder"
        raise UsageError(
            f"{root} is not one folder of images per class: it holds {what}; put the pictures of each class in a "
            "folder of its own."
        )
    if not nested:
        _refuse_parent(root, found)
    for name, files in found.items():
        if not files:
            raise UsageError(
                f"{root} is not one folder of images per class: {name!r} holds no picture; remove that folder, or "
                f"put files in it that end in {', '.join(KINDS)}."
            )
    return Listing(
        classes=tuple(folders),
        files=[file for files in found.values() for file in files],
        labels=[label for label, files in enumerate(found.values()) for _ in files],
        hidden=hidden,
        beside=beside,
    )


def _walk(root: Path, name: str, hidden: list[str]) -> Iterator[str]:
    """Yield the pictures below a class folder in ImageFolder's order; hidden ones are added to `hidden`."""
    seen: set[tuple[int, int]] = set()
    folders: list[tuple[str, list[str]]] = []
    waiting = [name]
    while waiting:
        folder = waiting.pop()
        state = os.stat(root / folder)
        # Following a link to a parent folder would never end.
        if (state.st_dev, state.st_ino) in seen:
            continue
        seen.add((state.st_dev, state.st_ino))
        files = []
        for entry in list(os.scandir(root / folder)):
            path = f"{folder}{os.sep}{entry.name}"
            directory = entry.is_dir()
            if is_hidden(entry.name):
                hidden.extend([path] if directory or _kind(entry.name) else [])
            elif directory:
                waiting.append(path)
            elif _kind(entry.name):
                # A broken link is named when it is read.
                if not entry.is_file() and os.path.exists(entry.path):
                    raise UsageError(f"{entry.path} is a pipe, a socket or a device, not a picture; remove it.")
                files.append(path)
        folders.append((folder, sorted(files)))
    for _, files in sorted(folders):
        yield from files


def _refuse_parent(root: Path, found: dict[str, list[str]]) -> None:
    """Refuse a folder whose folders are parts of a data set, such as train and val, or data sets themselves."""
    inner = {name: _folders_of(name, files) for name, files in found.items() if files}
    deep = sorted(name for name, folders in inner.items() if len(folders) > 1 and None not in folders)
    splits = all(_SPLIT.fullmatch(name.lower()) for name in inner)
    # Class folders may have folders inside, but rarely the same ones in each.
    alike = len(deep) == len(inner) and len(set(map(frozenset, inner.values()))) == 1
    if not deep or not (splits or alike):
        return
    held_out = [name for name in deep if not name.lower().startswith("train")]
    raise UsageError(
        f"{root} holds the folders {_some(sorted(inner))}, and class folders are inside these; "
        f"write folder:{root / (held_out or deep)[0]}, or name them with ?classes=A,B if they are."
    )


def _folders_of(name: str, files: list[str]) -> set[str | None]:
    """Return the folders inside a class folder that hold pictures; None is the class folder itself."""
    below = [file.removeprefix(f"{name}{os.sep}") for file in files]
    return {path.split(os.sep)[0] if os.sep in path else None for path in below}


def _kind(name: str) -> bool:
    return name.rpartition(".")[2].lower() in KINDS and "." in name


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
