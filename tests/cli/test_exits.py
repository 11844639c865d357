"""Exit codes and streams: every failure has its code and one sentence; stdout holds results only."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from robustkit.cli import run
from robustkit.cli.verbs import listing
from robustkit.models.classifier import Classifier, as_classifier

# Fast: it imports no torch.
LIST = f"{sys.executable} -m robustkit list"
NET = """
import os, sys, torch
def net(how):
    if how == "elsewhere":
        os.chdir("/")
    if how == "factory":
        sys.exit(0)
    def answer(x):
        print("printed by the model")
        if how == "close":
            sys.stdout.close(), sys.stderr.close()
        if how == "exit":
            sys.exit(0)
        return x.flatten(1)[:, :10] * 3
    return answer
"""
DATA = ("--data", "digits:test", "--limit", "4", "--threat", "linf:0.1", "--suite", "fgsm")


def shell(line: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", "-c", f"set -o pipefail; {line}"]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=60, env={**os.environ, **environment}, encoding="utf-8"
    )


def raising(error: BaseException) -> Callable[..., int]:
    def show(*_: object) -> int:
        raise error

    return show


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (TypeError("two\nlines."), "unexpected TypeError: two; run again with --debug for the traceback."),
        (KeyError(), "unexpected KeyError; run"),
        (SystemExit(0), "unexpected SystemExit: 0;"),
        (KeyboardInterrupt(), "unexpected KeyboardInterrupt;"),
        (GeneratorExit(), "unexpected GeneratorExit;"),
        (EOFError(), "unexpected EOFError;"),
        (MemoryError(), "unexpected MemoryError;"),
        (RecursionError("maximum recursion depth exceeded"), "unexpected RecursionError: maximum"),
        (BrokenPipeError(32, "Broken pipe"), "unexpected BrokenPipeError: [Errno 32] Broken pipe;"),
        (OSError(28, "No space left on device"), "unexpected OSError: [Errno 28] No space"),
        (ValueError("\x1b[31mred \udcff"), r"unexpected ValueError: \x1b[31mred \udcff;"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_unexpected_error_is_exit_code_3_with_one_sentence(
    error: BaseException, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(listing, "show", raising(error))
    assert run(["list"]) == 3
    out, err = capsys.readouterr()
    assert (out, len(err.splitlines())) == ("", 1)
    assert err.startswith(f"error: {words}")
    assert run(["list", "--debug"]) == 3
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "code", "words"), [("SIGINT", 130, "interrupted"), ("SIGTERM", 143, "ended by SIGTERM")]
)
def test_signals_have_their_exit_codes(
    name: str, code: int, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(listing, "show", lambda *_: signal.raise_signal(getattr(signal, name)))
    assert run(["list"]) == code
    assert capsys.readouterr().err == f"{words}; the same command resumes\n"
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize(
    ("line", "code", "words"),
    [
        (f"{LIST} | head -1", 0, ""),
        (f"{LIST} --json > /dev/full", 3, "No space left on device"),
        (f"{LIST} >&-", 3, "Bad file descriptor"),
        (f"{LIST} <&- | cat", 0, ""),
        (f"{LIST} nothing 2>&-", 2, ""),
        (f"{LIST} nothing 2>/dev/full", 2, ""),
        (f"{LIST} --help > /dev/full", 3, "No space left on device"),
    ],
)
def test_closed_and_full_output_streams(line: str, code: int, words: str) -> None:
    done = shell(line)
    assert done.returncode == code
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == bool(words), done.stderr


def test_an_ascii_stream_gets_replaced_characters() -> None:
    code = "import rich.console as c; from robustkit.cli import streams as s\nwith s.own_process(), s.guarded():\n"
    code += " s.print_result('1 – 2 … é'); c.Console().print('3 – 4')"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, env={**os.environ, "PYTHONIOENCODING": "ascii"}
    )
    assert (done.returncode, done.stdout) == (0, b"1 - 2 ... \\xe9\n3 - 4\n"), done.stderr


def test_a_model_that_prints_or_exits_is_contained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(NET)
    assert run(["evaluate", "./net.py:net?how=ok", *DATA, "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["n"] == 4
    assert "printed by the model" in err
    assert run(["evaluate", "./net.py:net?how=factory", *DATA]) == 2
    assert "failed with SystemExit: 0" in capsys.readouterr().err
    assert run(["evaluate", "./net.py:net?how=exit", *DATA]) == 3
    assert "called sys.exit(0): remove that call" in capsys.readouterr().err


@pytest.mark.parametrize("how", ["close", "elsewhere"])
def test_a_model_that_closes_streams_or_changes_the_folder_does_no_harm(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(NET)
    assert run(["evaluate", f"net.py:net?how={how}", *DATA, "--out", "run", "--no-html"]) == 0
    assert capfd.readouterr().out.startswith("run ")
    assert Path("run/report.json").is_file()


def test_an_exit_of_a_model_raises_an_error_in_python() -> None:
    import torch

    from robustkit.core.errors import RunError

    model: Classifier = as_classifier(lambda x: sys.exit("bye"))
    with pytest.raises(RunError, match=r"called sys.exit\('bye'\)"):
        model(torch.zeros(2, 3, 5, 7))
