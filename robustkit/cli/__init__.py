"""The command line: verbs, errors as one sentence, exit codes. Its work is imported inside the verbs."""

from __future__ import annotations

import os
import sys

from robustkit.errors import RobustkitError, RunError

DONE, NEGATIVE, USAGE, FAILED, INTERRUPTED = 0, 1, 2, 3, 130

# Verbs with flags that are given once for each of several models.
SEVERAL = ("craft", "transfer", "matrix")


def main() -> None:
    """Run the command line and exit with the contract's code."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run one command and return its exit code."""
    import typer

    from robustkit.cli.app import app

    command = typer.main.get_command(app)
    try:
        code = int(command.main(arguments, prog_name="robustkit", standalone_mode=False) or DONE)
    except RobustkitError as error:
        if "--debug" in arguments:
            raise
        print(f"error: {error}", file=sys.stderr)
        return FAILED if isinstance(error, RunError) else USAGE
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except BrokenPipeError:
        # Whoever read the output has left; keep Python from complaining about it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except Exception as error:
        show = getattr(error, "format_message", None)
        if show is None:
            raise
        # typer's word for a whole number with a least value
        words = show().replace(" int range", " integer")
        if "unexpected extra argument" in words and arguments[0] in SEVERAL:
            words += ": write a flag before each model, as in --target A --target B."
        print(f"error: {words}", file=sys.stderr)
        return USAGE
    if code == INTERRUPTED:  # newer versions of typer return it, older ones raise
        print("interrupted; the same command resumes", file=sys.stderr)
    return code
