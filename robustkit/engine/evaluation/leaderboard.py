"""Several models, each evaluated in its own run: one after another, or at the same time by workers."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from robustkit.core.errors import RobustkitError, RunError, UsageError, error_summary
from robustkit.core.writing import subfolder
from robustkit.distributed.sharing import SharedPool, shared_pool
from robustkit.engine.evaluation.run import Evaluation
from robustkit.engine.progress import CheckedProgress, Progress
from robustkit.runs.evaluation_record import Report
from robustkit.runs.opening import clear
from robustkit.runs.spec import dumps

# A name before a model string has none of the characters of model strings.
_NAMED = re.compile(r"([^:/?@#=\[\];]+?)\s*=\s*(.*)")
_COMMENT = re.compile(r"(^|\s)#.*")
FIRST = "leaderboard."


@dataclass(frozen=True)
class NamedModel:
    """A model of the list: its name there, and its string."""

    name: str
    string: str


def read_models(path: Path) -> list[NamedModel]:
    """Return the models of a text file: a model string on each line, or NAME=STRING; comments start with #.

    A # within a word starts none: `runs/x/#2` is a model string. Paths are relative to the working folder.

    Raises:
        UsageError: the file cannot be read, has no model, or one that is not named, or named twice.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UsageError(
            f"cannot read the list of models {path}: {error.strerror or error}; write a text file with a model "
            "string on each line."
        ) from error
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{path} is no text file; write one with a model string on each line, as robustkit:digits-cnn."
        ) from error
    found: dict[str, NamedModel] = {}
    for number, line in enumerate(text.splitlines(), 1):
        text_line = _COMMENT.sub("", line).strip()
        if not text_line:
            continue
        match = _NAMED.fullmatch(text_line)
        name, string = match.groups() if match else (text_line, text_line)
        if not string:
            raise UsageError(
                f"{path}, line {number}: {text_line!r} names no model; write NAME=MODEL, or MODEL alone."
            )
        if name in found or any(string == entry.string for entry in found.values()):
            raise UsageError(f"{path}, line {number}: {name!r} is in the list already; write each model once.")
        found[name] = NamedModel(name, string)
    if not found:
        raise UsageError(f"{path} lists no model; write a model string on each line, as robustkit:digits-cnn.")
    return list(found.values())


def settings_id(**settings: object) -> str:
    """Return eight hexadecimal digits of the hash of the settings that all models share."""
    return hashlib.sha256(dumps(settings).encode()).hexdigest()[:8]


@dataclass(frozen=True)
class LeaderboardRun:
    """Models to evaluate: `plan` loads one and returns its evaluation; `workers` and `ray` as in `Evaluation`."""

    entries: Sequence[NamedModel]
    plan: Callable[[NamedModel], Evaluation]
    workers: int | None = None
    ray: str | None = None

    def run(
        self, out: Path, progress: Progress, line: Callable[[str], Progress], overwrite: bool = False
    ) -> list[tuple[Path, Report] | RobustkitError]:
        """Run, or resume, or read the stored reports: each model in its own folder within `out`.

        Args:
            out: the folder of the runs' folders.
            progress: receives the events of workers and of finished models.
            line: returns what receives the events of the model of a name.
            overwrite: delete the runs in `out` first.

        Returns:
            In the order of the list: folder and report of each model, or the error of one that cannot be loaded or
            evaluated. It stops no other.
        """
        if overwrite and out.is_dir():
            clear(out)
        else:
            _check_folder(out)
        taken: dict[str, str] = {}

        def work(entry: NamedModel, pool: SharedPool | None = None) -> tuple[Path, Report]:
            own_progress = CheckedProgress(line(entry.name), pool.check) if pool else line(entry.name)
            try:
                plan = self.plan(entry)
                if plan.spec.run_id in taken:
                    raise UsageError(f"it is the model {taken[plan.spec.run_id]!r} once more; list it once.")
                taken[plan.spec.run_id] = entry.name
                folder = subfolder(out, f"evaluate-{plan.spec.run_id}")
                report = plan.run(folder, own_progress, pool)
            except RobustkitError as error:
                progress.say(f"{entry.name}: {error}")
                raise
            except Exception as error:
                # An error in one model's code does not stop the others.
                progress.say(f"{entry.name}: {error_summary(error)}")
                raise RunError(error_summary(error)) from error
            finally:
                own_progress.close()
            rate = report.robust_accuracy
            progress.say(f"{entry.name}: {100 * rate.value:.1f} % robust accuracy ({report.run_id})")
            return folder, report

        try:
            if self.workers in (None, 1) and self.ray is None:
                return [_result_or_error(work, entry) for entry in self.entries]
            with shared_pool(self.workers, self.ray, progress.say, several=True) as pool:
                return pool.run([partial(work, entry, pool) for entry in self.entries])
        finally:
            progress.close()


def _result_or_error(
    work: Callable[[NamedModel], tuple[Path, Report]], entry: NamedModel
) -> tuple[Path, Report] | RobustkitError:
    try:
        return work(entry)
    except RobustkitError as error:
        return error


def _check_folder(out: Path) -> None:
    """Raise UsageError for a folder that holds anything but runs and their leaderboard."""
    known = ("evaluate-", FIRST, ".")
    others = [file.name for file in out.iterdir() if not file.name.startswith(known)] if out.is_dir() else []
    if others or (out.exists() and not out.is_dir()):
        what = f"holds {min(others)!r}, which is no run of a list of models" if others else "is no folder"
        raise UsageError(
            f"{out} {what}; give an empty or new folder with --out, or --overwrite what robustkit wrote there."
        )
