"""Records of unfinished work in a run folder: one file per task, deleted when the task is done.

A record is plain values and tensors; nothing in it is executed when it is read. Its length and sha256 are stored
before it: a record that was cut off by a kill, or changed, ends the file, and later work is repeated.
"""

from __future__ import annotations

import hashlib
import io
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from robustkit.core.writing import not_written, refuse_link, replacing, subfolder

Record = Mapping[str, Any]

# The most bytes of one task, and the largest share of the free disk space.
MAX_BYTES, MAX_DISK_SHARE = 4 << 30, 0.25


def encoded(record: Record) -> bytes:
    """Return a record as bytes."""
    file = io.BytesIO()
    torch.save(dict(record), file)
    return file.getvalue()


def decoded(body: bytes) -> dict[str, Any]:
    """Return the record of these bytes; nothing in them is executed."""
    record: dict[str, Any] = torch.load(io.BytesIO(body), map_location="cpu", weights_only=True)
    return record


class Store:
    """Records by the name of their task; without a folder nothing is kept."""

    def __init__(self, folder: Path | None, run_id: str = "") -> None:
        """Keep the records of this run in this folder, created at the first one."""
        self.folder, self.run_id = folder, run_id

    @property
    def keeps(self) -> bool:
        """Whether records are kept."""
        return self.folder is not None

    def here(self) -> Store:
        """Return the store for use in this process: one that keeps nothing if the folder does not exist here."""
        reached = self.folder is not None and self.folder.parent.is_dir()
        return self if reached else Store(None, self.run_id)

    def state(self, name: str) -> Record | None:
        """Return the state that a task last started from; None if it has none."""
        for body in self.read(name):
            record = decoded(body)
            state: Record | None = record["state"] if record["kind"] == "begin" else None
            return state
        return None

    def names(self, prefix: str) -> list[str]:
        """Return the names of tasks that start with the prefix."""
        if self.folder is None or not self.folder.is_dir():
            return []
        own = f"{self.run_id}."
        names = (file.name.removeprefix(own) for file in self.folder.iterdir() if file.name.startswith(own))
        return sorted(name for name in names if name.startswith(prefix))

    def read(self, name: str) -> Iterator[bytes]:
        """Yield the records of a task, up to the first damaged one."""
        if self.folder is None:
            return
        place = self._place(name)
        if not place.is_file() or place.is_symlink():
            return
        with place.open("rb") as file:
            while len(head := file.read(40)) == 40:
                body = file.read(int.from_bytes(head[:8], "little"))
                if hashlib.sha256(body).digest() != head[8:]:
                    return
                yield body

    def append(self, name: str, *bodies: bytes) -> None:
        """Append records to a task."""
        if self.folder is None or not bodies:
            return
        subfolder(self.folder.parent, self.folder.name)
        place = self._place(name)
        refuse_link(place)
        try:
            with place.open("ab") as file:
                for body in bodies:
                    file.write(_framed(body))
        except OSError as error:
            raise not_written(place, error) from error

    def replace(self, name: str, *bodies: bytes) -> None:
        """Replace the records of a task by these; without any the file is deleted."""
        if self.folder is None:
            return
        place = self._place(name)
        if not bodies:
            place.unlink(missing_ok=True)
            return
        subfolder(self.folder.parent, self.folder.name)
        with replacing(place) as file:
            for body in bodies:
                file.write(_framed(body))

    def _place(self, name: str) -> Path:
        assert self.folder is not None  # noqa: S101
        return self.folder / f"{self.run_id}.{name}"

    def capacity(self) -> float:
        """Return how many bytes a task may have."""
        if self.folder is None:
            return 0
        return min(MAX_BYTES, MAX_DISK_SHARE * shutil.disk_usage(self.folder.parent).free)

    def clear(self) -> None:
        """Delete all records: the run is finished."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)


def _framed(body: bytes) -> bytes:
    return len(body).to_bytes(8, "little") + hashlib.sha256(body).digest() + body
