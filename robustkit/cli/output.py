"""Files that a verb was asked to write."""

from __future__ import annotations

import sys
from pathlib import Path

from robustkit.cli.streams import results
from robustkit.cli.terminal import Terminal
from robustkit.core.errors import RunError, UsageError, one_line
from robustkit.core.writing import is_read_only, reason, write


def result_console(width: int | None = None) -> Terminal:
    """Return the console that a verb's result is printed on."""
    return Terminal(file=results(), width=width)


def wide_console() -> Terminal:
    """Return the same for a table of many models, which is not cut in pipes and files."""
    terminal = result_console()
    return terminal if terminal.is_terminal else result_console(width=240)


def save_page(path: Path, content: bytes) -> Path | None:
    """Write the page of a run into its folder; return it, or None where it is absent from a read-only folder."""
    try:
        write(path, content)
    except RunError as error:
        if not is_read_only(why := error.__cause__) or not isinstance(why, OSError):
            raise
        advice = f"write the page elsewhere: robustkit report {path.parent} --html FILE"
        print(one_line(f"cannot write {path}: {reason(why)}; {advice}"), file=sys.stderr)
    return path if path.is_file() else None


def save(path: Path, content: bytes) -> None:
    """Write a file whole or not at all; UsageError if it cannot be written."""
    try:
        write(path, content)
    except RunError as error:
        if isinstance(why := error.__cause__, OSError):
            raise UsageError(f"cannot write {path}: {reason(why)}; choose another file.") from error
        raise
