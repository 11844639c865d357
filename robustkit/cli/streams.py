"""The standard streams: only results on stdout, everything else on stderr, whatever the two are connected to."""

from __future__ import annotations

import io
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from typing import Any, TextIO, cast

from robustkit.core.errors import RunError, one_line, printable

# Replacements for characters of our texts that the encoding of a stream lacks.
SUBSTITUTES = str.maketrans({"–": "-", "−": "-", "…": "...", "→": "->", "━": "-", "╸": "-", "╺": "-"})


class Stream:
    """A text stream that ignores writes after the first failed one; `_failed` decides what a failure means."""

    def __init__(self, stream: TextIO) -> None:
        """Wrap a stream."""
        self._stream = stream
        self._closed = False

    def __getattr__(self, name: str) -> Any:
        """Return any other attribute of the stream."""
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write text; characters that the encoding lacks are replaced or escaped."""
        try:
            self._try(self._stream.write, text)
        except UnicodeEncodeError as error:
            known = text.translate(SUBSTITUTES).encode(error.encoding, "backslashreplace").decode(error.encoding)
            self._try(self._stream.write, known)
        return len(text)

    def close(self) -> None:
        """Stay open: the code of a model or library must not close the stream."""

    def flush(self) -> None:
        """Flush the buffer."""
        self._try(self._stream.flush)

    def _try(self, work: Callable[..., object], *arguments: str) -> None:
        if self._closed:
            return
        try:
            work(*arguments)
        except OSError as error:
            self._closed = True
            self._failed(error)

    def _failed(self, error: OSError) -> None:
        """Ignore messages that cannot be delivered."""


class Results(Stream):
    """Standard output: a closed pipe is no failure, a full disk is one."""

    def _failed(self, error: OSError) -> None:
        if not isinstance(error, BrokenPipeError):
            raise RunError(
                f"cannot write the result to standard output: {error.strerror or error}; "
                "run the command again with another output."
            ) from error


_results: TextIO | None = None


def results() -> TextIO:
    """Return the stream for the results of a verb; what other code prints goes to stderr meanwhile."""
    return _results or sys.stdout


def print_result(text: str = "") -> None:
    """Print lines of a verb's result."""
    print(printable(text, keep="\n"), file=results())


@contextmanager
def guarded() -> Iterator[None]:
    """Wrap stdout in `Results` and stderr in `Stream` in the block, and flush both at its end."""
    out, err = Results(sys.stdout), Stream(sys.stderr)
    with redirect_stdout(cast(TextIO, out)), redirect_stderr(cast(TextIO, err)):
        yield
    err.flush()


@contextmanager
def results_apart() -> Iterator[None]:
    """Keep stdout for `results` in the block; what a model, an attack or a library prints goes to stderr."""
    global _results
    before, _results = _results, results()
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        _results = before


@contextmanager
def own_process() -> Iterator[None]:
    """Prepare the streams of a process that runs only one command.

    Closed streams are opened, so that no file of a run gets their numbers; stdout is moved to another number, so
    that libraries written in C cannot print to it; a warning of a library is printed as one line.
    """
    warnings.formatwarning = _warning
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # a closed stdout must stay unwritable
            os.open(os.devnull, os.O_RDONLY if number == 1 else os.O_RDWR)
    out, err = (stream.encoding if stream else "utf-8" for stream in (sys.stdout, sys.stderr))
    kept = os.dup(1)
    os.dup2(2, 1)
    sys.stdout = io.TextIOWrapper(open(kept, "wb"), out, line_buffering=os.isatty(kept))
    sys.stderr = io.TextIOWrapper(open(2, "wb", closefd=False), err, line_buffering=True)
    try:
        yield
    finally:
        # Drop what could not be written: Python would try again at exit, and exit with code 120.
        for name in ("stdout", "stderr"):
            with suppress(OSError):
                getattr(sys, name).close()
            setattr(sys, name, open(os.devnull, "w"))


def _warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    text = str(message).strip().partition("\n")[0]
    return one_line(f"warning: {category.__name__}: {text} ({filename}:{lineno})") + "\n"
