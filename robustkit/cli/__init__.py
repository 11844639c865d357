"""The command line: runs a command, prints any error as one sentence, returns the exit code."""

from __future__ import annotations

import errno
import os
import sys
import traceback
import warnings

from robustkit.cli import streams
from robustkit.cli.signals import Interrupted, ended_by_signals
from robustkit.core.errors import RobustkitError, RunError, error_summary, one_line

DONE, NEGATIVE, USAGE, FAILED = 0, 1, 2, 3

# What decides how threads of OpenMP wait: the standard's variable, that of GCC's runtime, and that of LLVM's.
WAIT_POLICY_VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")

# Verbs with flags that are repeated for several models.
REPEATED_FLAGS = ("craft", "transfer", "matrix")


def main() -> None:
    """Run the command line and exit with the contract's code."""
    let_idle_threads_sleep()
    # Pillow warns about large images, which are then refused with an error.
    warnings.filterwarnings("ignore", message=".*decompression bomb")
    with streams.own_process():
        code = run(sys.argv[1:])
    sys.exit(code)


def let_idle_threads_sleep() -> None:
    """Have the CPU threads of torch sleep while they wait for each other, unless the user has set how they wait.

    By default they spin: beside other processes a pass then takes ten times the processor time (docs/speed.md).
    The variable is read when torch is imported, and worker processes inherit it.
    """
    if not any(name in os.environ for name in WAIT_POLICY_VARIABLES):
        os.environ["OMP_WAIT_POLICY"] = "passive"


def run(arguments: list[str]) -> int:
    """Run one command and return its exit code. Any error is printed as one sentence to stderr."""
    with streams.guarded(), ended_by_signals():
        try:
            code = _invoke(arguments)
            sys.stdout.flush()
            return code
        # The code of models and data may raise anything; sys.exit(0) in a model is no success.
        except BaseException as error:
            if "--debug" in arguments:
                traceback.print_exception(error)
            code, sentence = _explain(error, arguments)
            print(one_line(sentence), file=sys.stderr)
            return code


def _invoke(arguments: list[str]) -> int:
    """Parse and run a command, without typer's `main`, which handles some errors of the work as its own."""
    import typer

    from robustkit.cli.app import app
    from robustkit.cli.command import check_words
    from robustkit.runs.invocation import record_command

    check_words(arguments)
    try:
        with typer.main.get_command(app).make_context("robustkit", list(arguments)) as context:
            with record_command(arguments):
                return int(context.command.invoke(context) or DONE)
    except typer.Exit as end:
        return end.exit_code
    except Exception as error:
        if type(error).__name__ != "NoArgsIsHelpError":
            raise
        print(error, file=sys.stderr)
        return USAGE


def _explain(error: BaseException, arguments: list[str]) -> tuple[int, str]:
    """Return the exit code of an error and the sentence for it."""
    if isinstance(error, RobustkitError):
        return FAILED if isinstance(error, RunError) else USAGE, f"error: {error}"
    if isinstance(error, Interrupted):
        return error.code, f"{error}; the same command resumes"
    if (show := getattr(error, "format_message", None)) is not None:
        words = show()
        if "unexpected extra argument" in words and arguments[0] in REPEATED_FLAGS:
            words += ": repeat the flag for each model, as in --target A --target B."
        return USAGE, f"error: {words}"
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        return USAGE, f"error: the name {error.filename!r} is longer than a file name can be; use a shorter one."
    return FAILED, f"error: unexpected {error_summary(error)}; run again with --debug for the traceback."
