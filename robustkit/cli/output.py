"""Files and consoles that verbs write to."""

from __future__ import annotations

import sys
from pathlib import Path

from robustkit.cli.streams import results
from robustkit.cli.terminal import Terminal
from robustkit.core.errors import RunError, UsageError, one_line
from robustkit.core.writing import is_read_only, reason, write


def result_console(width: int | None = None) -> Terminal:
    """Return the console for the result of a verb."""
    return Terminal(file=results(), width=width)


def wide_console() -> Terminal:
    """Return the console for a table of many models, which is not cut off in pipes and files."""
    terminal = result_console()
    return terminal if terminal.is_terminal else result_console(width=240)


def save_page(path: Path, content: bytes) -> Path | None:
    """Write the page of a run into its folder; return its path, None if a read-only folder has no page."""
    try:
        write(path, content)
    except RunError as error:
        if not is_read_only(cause := error.__cause__) or not isinstance(cause, OSError):
            raise
        advice = f"write the page elsewhere: robustkit report {path.parent} --html FILE"
        print(one_line(f"cannot write {path}: {reason(cause)}; {advice}"), file=sys.stderr)
    return path if path.is_file() else None


def save(path: Path, content: bytes) -> None:
    """Write a file completely or not at all; UsageError if it cannot be written."""
    try:
        write(path, content)
    except RunError as error:
        if isinstance(cause := error.__cause__, OSError):
            raise UsageError(f"cannot write {path}: {reason(cause)}; choose another file.") from error
        raise
