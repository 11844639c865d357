"""Opens a run folder for writing: one process at a time, for one run; may delete what is there."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from robustkit.core.errors import RobustkitError, UsageError
from robustkit.core.writing import DRAFT, is_read_only, remove_drafts, unlink_link, write
from robustkit.posterior import FILE as POSTERIOR
from robustkit.posterior.draft import FOLDER as SAMPLES
from robustkit.runs import run_folder
from robustkit.runs.ledger import Ledger
from robustkit.runs.ledger_schema import FILES
from robustkit.runs.run_folder import Spec
from robustkit.runs.spec import dumps
from robustkit.runs.training_record import CHECKPOINTS, CURVES, KEPT, METRICS, RECORD, WEIGHTS

LOCK = ".lock"
# The file whose presence means that a run of each verb is finished.
FINISHED = {
    "evaluate": run_folder.REPORT,
    "craft": run_folder.TRANSFER,
    "train": RECORD,
    "diversity": run_folder.DIVERSITY,
    "corrupt": run_folder.CORRUPTIONS,
}
# The names of all files that robustkit writes into a run folder, or into the folder of several runs.
OWN = frozenset(
    {
        *FINISHED.values(),
        *CHECKPOINTS,
        *(run_folder.LEDGER + ending for ending in FILES),
        *(
            run_folder.SPEC,
            run_folder.ADVERSARIAL,
            run_folder.EXAMPLES,
            run_folder.PAGE,
            run_folder.MATRIX,
            METRICS,
            WEIGHTS,
            POSTERIOR,
        ),
        *("matrix.html", "diversity.html", "corruptions.html", "leaderboard.json", "leaderboard.html"),
    }
)
OWN_FOLDERS = {
    run_folder.UNFINISHED: re.compile(r"[0-9a-f]{8}\..*"),
    SAMPLES: re.compile(r"\d{4,}\.safetensors"),
    KEPT: re.compile(r"(?!)"),
    CURVES: re.compile(r"events\.out\.tfevents\..*"),
}
RUN = re.compile(r"(evaluate|craft)-[0-9a-f]{8}")


@contextmanager
def open_for_writing(
    path: Path, spec: Spec, *, overwrite: bool = False, say: Callable[[str], None] | None = None
) -> Iterator[bool]:
    """Create or reopen the folder of a run, locked against other processes.

    A run with another spec is deleted if it has no verdict of an attack, or no checkpoint.

    Args:
        path: the folder.
        spec: of the run that is to be in it.
        overwrite: delete the run that is in it; other files stay.
        say: receives the message that another run is deleted.

    Yields:
        Whether the folder can be written; it need not be if the run is finished.

    Raises:
        UsageError: if it cannot be written, holds another run or other files, or another process is in it.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = _lock(path)
    except OSError as error:
        if is_read_only(error) and not overwrite and _is_finished(path, spec):
            yield False
            return
        raise UsageError(
            f"cannot write the run folder {path}: {error.strerror or error}; choose another with --out."
        ) from error
    try:
        remove_drafts(path)
        if overwrite or _is_replaceable(path, spec, say):
            clear(path)
        elif not (path / run_folder.SPEC).exists() and (others := _others(path)):
            raise UsageError(f"{path} holds {others[0]!r} but no run; give an empty or new folder with --out.")
        if not (path / run_folder.SPEC).exists():
            write(path / run_folder.SPEC, (dumps(spec, indent=2) + "\n").encode())
        yield True
    finally:
        lock.release()


def require_writable(path: Path | None, writable: bool, what: str) -> None:
    """Raise UsageError if a folder cannot be written."""
    if not writable:
        raise UsageError(f"{path} cannot be written, so {what} cannot be added; copy it to a folder that can be.")


def clear(path: Path) -> None:
    """Delete what robustkit has written into a folder of a run or of several; other files stay.

    Raises:
        UsageError: if the folder holds files, but no run.
    """
    if not _holds_run(path):
        if others := _others(path):
            raise UsageError(
                f"{path} holds {others[0]!r} but no run that could be overwritten; give an empty or new folder "
                "with --out."
            )
        return
    for file in path.iterdir():
        if (
            (RUN.fullmatch(file.name) or file.name == run_folder.AUDIT)
            and not file.is_symlink()
            and _is_spec(file)
        ):
            lock = _lock(file)
            try:
                clear(file)
                (file / LOCK).unlink(missing_ok=True)
            finally:
                lock.release()
            _remove_empty(file)
        else:
            _remove_own(file)


def _remove_own(file: Path, own: re.Pattern[str] | None = None) -> None:
    """Remove a file or folder if its name is one of robustkit's own, or matches; links go, not where they lead."""
    if file.name in OWN_FOLDERS and file.is_dir() and not file.is_symlink():
        for inner in file.iterdir():
            _remove_own(inner, OWN_FOLDERS[file.name])
        _remove_empty(file)
    elif file.is_symlink() or not file.is_dir():
        named = own.fullmatch(file.name) if own else file.name in OWN or file.name in OWN_FOLDERS
        if named or DRAFT.fullmatch(file.name):
            file.unlink()


def _remove_empty(path: Path) -> None:
    with suppress(OSError):
        path.rmdir()


def _lock(path: Path) -> FileLock:
    """Return the lock of a folder, taken; OSError if the folder cannot be written."""
    unlink_link(path / LOCK)
    lock = FileLock(path / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UsageError(f"another process is working in {path}; wait for it or give another --out.") from None
    return lock


def _is_replaceable(path: Path, spec: Spec, say: Callable[[str], None] | None) -> bool:
    """Return whether a folder holds a run with another spec and without a result; refuse one that has any."""
    if not (path / run_folder.SPEC).exists():
        return False
    old = run_folder.read_spec(path)
    if old.run_id == spec.run_id:
        return False
    kept = (*FINISHED.values(), *CHECKPOINTS, WEIGHTS, POSTERIOR)
    if not any((path / name).exists() for name in kept) and Ledger.is_unattacked(path / run_folder.LEDGER):
        if say is not None:
            say(f"run {old.run_id} in {path} has no result and is replaced by run {spec.run_id}")
        return True
    advice = "give another --out folder, or remove that run with --overwrite."
    if old.verb != spec.verb:
        raise UsageError(f"{path} holds run {old.run_id} of robustkit {old.verb}; {advice}")
    before, now = old.identity, spec.identity
    differing = [name for name in now if before[name] != now[name]]
    raise UsageError(f"{path} holds run {old.run_id}, which differs in {', '.join(differing)}; {advice}")


def _is_finished(path: Path, spec: Spec) -> bool:
    """Return whether a folder holds this run's result."""
    return (path / FINISHED[spec.verb]).is_file() and run_folder.read_spec(path).run_id == spec.run_id


def _holds_run(path: Path) -> bool:
    """Return whether a folder is that of a run, or of several."""
    several = any((path / name).is_file() for name in (run_folder.MATRIX, "leaderboard.json"))
    return _is_spec(path) or several or any(RUN.fullmatch(one.name) and _is_spec(one) for one in path.iterdir())


def _is_spec(path: Path) -> bool:
    try:
        run_folder.read_spec(path)
    except RobustkitError:
        return False
    return True


def _others(path: Path) -> list[str]:
    return sorted(file.name for file in path.iterdir() if not file.name.startswith("."))


def finished_before(run_id: str, what: str = "this is its stored result (see --overwrite)") -> str:
    """Return the message of a finished run that is called again; `what` says what follows."""
    return f"run {run_id} was finished before; {what}"
