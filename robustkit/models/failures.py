"""Errors of others' code in one line, with the place where they occurred."""

from __future__ import annotations

import linecache
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import CodeType

import torch

_LONGEST = 300
_PACKAGE = Path(__file__).parents[1]
_STANDARD = tuple(Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib"))
_INSTALLED = tuple(Path(sysconfig.get_path(name)) for name in ("purelib", "platlib"))
# Code that is not the user's: first without installed packages, which may hold the model, then with them.
_LIBRARIES = (
    (*_STANDARD, *_INSTALLED, _PACKAGE, _PACKAGE.resolve()),
    (*_STANDARD, Path(torch.__file__).parent, _PACKAGE, _PACKAGE.resolve()),
)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the line of code that raised it if it has none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        frames = list(_frames(error))
        lines = [linecache.getline(frames[-1][0].co_filename, frames[-1][1]).strip()] if frames else []
    elif "TorchScript" in lines[0]:
        # Its traceback comes first, and the error last.
        lines.reverse()
    text = lines[0].rstrip(".") if lines else ""
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


def described(error: BaseException) -> str:
    """Return an error's type, first line and place, e.g. `KeyError: 'a' (net.py:12, forward)`."""
    text, where = first_line(error), _place(error)
    name = type(error).__name__
    if text.startswith(f"{name}: "):
        name, text = text.split(": ", 1)
    return (f"{name}: {text}" if text else name) + (f" ({where})" if where else "")


def _place(error: BaseException) -> str:
    """Return file, line and function of the innermost frame of the user's code, else of the library's."""
    frames = [frame for frame in _frames(error) if Path(frame[0].co_filename).is_file()]
    for libraries in _LIBRARIES:
        own = [frame for frame in frames if not _within(frame[0].co_filename, libraries)]
        if own:
            frames = own
            break
    if not frames:
        return ""
    code, line = frames[-1]
    return f"{_short(Path(code.co_filename))}:{line}, {code.co_name}"


def _frames(error: BaseException) -> Iterator[tuple[CodeType, int]]:
    """Yield code and line of each frame below the one that caught the error, outermost first."""
    trace = error.__traceback__ and error.__traceback__.tb_next
    while trace is not None:
        yield trace.tb_frame.f_code, trace.tb_lineno
        trace = trace.tb_next


def _within(file: str, folders: tuple[Path, ...]) -> bool:
    return any(Path(file).is_relative_to(folder) for folder in folders)


def _short(file: Path) -> Path:
    """Return a path as a user in the current folder writes it."""
    return file.relative_to(Path.cwd()) if file.is_relative_to(Path.cwd()) else file
