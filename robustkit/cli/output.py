"""Files that a verb was asked to write."""

from __future__ import annotations

import os
from pathlib import Path

from rich.console import Console

from robustkit.errors import UsageError


def wide_console() -> Console:
    """Return the terminal, or for pipes and files a console on which a table of many models is not cut."""
    terminal = Console(markup=False)
    return terminal if terminal.is_terminal else Console(width=240, markup=False)


def save(path: Path, content: bytes) -> None:
    """Write a file whole or not at all; UsageError if it cannot be written."""
    draft = path.with_name(f".{path.name}.part")
    try:
        if path.is_dir():
            raise IsADirectoryError(None, "it is a folder")
        try:
            draft.write_bytes(content)
            os.replace(draft, path)
        finally:
            draft.unlink(missing_ok=True)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror or error}; choose another file.") from error
