"""Files that a verb was asked to write."""

from __future__ import annotations

import os
from pathlib import Path

from rich.console import Console

from robustkit.cli.streams import results
from robustkit.errors import UsageError


def result_console(width: int | None = None) -> Console:
    """Return the console that a verb's result is printed on."""
    return Console(file=results(), width=width, markup=False)


def wide_console() -> Console:
    """Return the same for a table of many models, which is not cut in pipes and files."""
    terminal = result_console()
    return terminal if terminal.is_terminal else result_console(width=240)


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
