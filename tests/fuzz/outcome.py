"""What every command must do for any input: end in time, with a documented exit code and one sentence."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path

import hypothesis
from hypothesis import HealthCheck

from robustkit.cli import run

# Seconds that a command may take.
LIMIT = 20
# How many examples a test draws: 40, always the same, or as many as this asks for, each time others.
EXAMPLES = os.environ.get("FUZZ_EXAMPLES")
CODES = {0, 1, 2, 3, 130}

fuzzed = hypothesis.settings(
    max_examples=int(EXAMPLES or 40),
    derandomize=EXAMPLES is None,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
    print_blob=True,
)


@contextlib.contextmanager
def in_time(what: object) -> Iterator[None]:
    """Fail if what is inside does not end within `LIMIT` seconds."""

    def late(*_: object) -> None:
        raise TimeoutError(f"no end within {LIMIT} seconds: {what!r}")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(LIMIT)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def outcome(command: Sequence[str], folder: Path) -> tuple[int, str, str]:
    """Run a command in a folder; return code, stdout and stderr, which are as they must be."""
    out, err, here = io.StringIO(), io.StringIO(), Path.cwd()
    os.chdir(folder)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), in_time(command):
            code = run(list(command))
    finally:
        os.chdir(here)
    stdout, stderr = out.getvalue(), err.getvalue()
    assert code in CODES, (command, code)
    assert "Traceback" not in stderr, stderr
    assert "error: unexpected" not in stderr, (command, stderr)
    if code in (2, 3) and "Usage:" not in stderr:
        assert stdout == "", (command, stdout)
        last = stderr.splitlines()[-1] if stderr else ""
        assert last.startswith("error: "), (command, stderr)
        assert len(last) < 4000, command
        assert last.isprintable(), (command, last)
    if code == 0 and "--json" in command and "--help" not in command:
        json.loads(stdout, parse_constant=_no_number)
    assert not any(word in stdout for word in (" nan", " inf ", "nan %", "inf %")), (command, stdout)
    return code, stdout, stderr


def _no_number(text: str) -> None:
    raise AssertionError(f"{text} in the JSON")
