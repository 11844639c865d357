"""The transfer matrix: images crafted on each of several models, evaluated on all of them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from robustkit.core.errors import RobustkitError, UsageError
from robustkit.core.threat import ThreatModel
from robustkit.core.writing import subfolder
from robustkit.crafting.judging import clean_flags
from robustkit.crafting.run import run_craft
from robustkit.crafting.spec import CraftRequest
from robustkit.data.samples import Samples
from robustkit.distributed.sharing import shared_pool
from robustkit.engine.model.loaded_models import Net, same_classes
from robustkit.engine.progress import CheckedProgress, Progress
from robustkit.runs import run_folder
from robustkit.runs.craft_record import Craft, Matrix, worst
from robustkit.runs.opening import clear


@dataclass(frozen=True)
class MatrixRequest:
    """Craft on each of `nets`, and evaluate on each of them and of `targets`.

    `workers` and `ray`, as in `Evaluation`, craft all rows at the same time.
    """

    nets: Sequence[Net]
    targets: Sequence[Net]
    samples: Samples
    threat: ThreatModel
    attack: str
    targeted: str | None
    seed: int
    device: torch.device
    batch_size: int | None
    workers: int | None = None
    ray: str | None = None

    def __post_init__(self) -> None:
        """Raise UsageError for fewer than two models, or models of different classes."""
        if len(self.nets) < 2:
            raise UsageError("a matrix needs at least two models; write --models A,B.")
        same_classes(self.nets, self.targets)

    @property
    def runs(self) -> list[CraftRequest]:
        """The craft run of each row."""
        return [
            CraftRequest(
                nets=[net],
                samples=self.samples,
                threat=self.threat,
                attack=self.attack,
                targeted=self.targeted,
                seed=self.seed,
                device=self.device,
                batch_size=self.batch_size,
            )
            for net in self.nets
        ]

    @property
    def run_id(self) -> str:
        """Eight hexadecimal digits of the hash of the runs' and the other targets' identities."""
        parts = [*(run.spec.run_id for run in self.runs), *(net.fingerprint for net in self.targets)]
        return hashlib.sha256("/".join(parts).encode()).hexdigest()[:8]

    def run(
        self, out: Path, progress: Progress, progress_of: Callable[[str], Progress], overwrite: bool = False
    ) -> Matrix:
        """Craft and evaluate row by row, each in its own folder; the same call resumes.

        Args:
            out: the folder of the rows' folders.
            progress: receives the events of the rows; with workers, theirs.
            progress_of: returns what receives the events of a model's row, where rows run at the same time.
            overwrite: delete the matrix or run in `out` first.
        """
        if overwrite and out.is_dir():
            clear(out)
        else:
            self._check_folder(out)
        columns = [*self.nets, *self.targets]
        runs = self.runs
        folders = [f"craft-{run.spec.run_id}" for run in runs]
        if self.workers in (None, 1) and self.ray is None:
            rows: list[Craft] = []
            for number, (run, place) in enumerate(zip(runs, folders, strict=True)):
                progress.say(f"row {number + 1} of {len(runs)}: crafting on {run.nets[0].string}")
                rows.append(run_craft(run, subfolder(out, place), columns, progress=progress))
        else:

            def work(number: int) -> Craft:
                events = CheckedProgress(progress_of(self.nets[number].string), pool.check)
                place = subfolder(out, folders[number])
                return run_craft(runs[number], place, columns, progress=events, pool=pool)

            rows = []
            try:
                with shared_pool(self.workers, self.ray, progress.say, several=True) as pool:
                    found = pool.run([partial(work, number) for number in range(len(runs))])
            finally:
                progress.close()
            for row in found:
                if isinstance(row, RobustkitError):
                    raise row
                rows.append(row)
        first = rows[0]
        judged = [{one.fingerprint: one for one in row.targets} for row in rows]
        clean = [judged[0][net.fingerprint] for net in columns]
        record = Matrix(
            run_id=self.run_id,
            models=[net.string for net in self.nets],
            targets=[net.string for net in self.targets],
            attack=first.spec.attack,
            targeted=self.targeted,
            data=first.spec.data,
            threat=first.spec.threat,
            seed=self.seed,
            n=first.n,
            gradients_per_image=[row.gradients_per_image for row in rows],
            clean_accuracy=[one.clean_accuracy for one in clean],
            noise=[one.noise for one in clean],
            success=[[row[net.fingerprint].rate for net in columns] for row in judged],
            worst=[
                worst(
                    [
                        one[net.fingerprint].fooled(row.labels, row.goals)
                        for place, (row, one) in enumerate(zip(rows, judged, strict=True))
                        if place != column
                    ]
                )
                for column, net in enumerate(columns)
            ],
            folders=folders,
            environment=first.environment,
            flags=[*self.samples.flags, *clean_flags(clean, first.labels, self.nets[0].classes)],
        )
        run_folder.write_record(out, record)
        return record

    def _check_folder(self, out: Path) -> None:
        """Raise UsageError for a folder that holds anything but this matrix."""
        own = {run_folder.MATRIX, "matrix.html", *(f"craft-{run.spec.run_id}" for run in self.runs)}
        others = [file.name for file in out.iterdir() if file.name not in own] if out.is_dir() else []
        if others or (out.exists() and not out.is_dir()):
            what = f"holds {sorted(others)[0]!r}, which is not of this matrix" if others else "is no folder"
            raise UsageError(
                f"{out} {what}; give an empty or new folder with --out, or --overwrite what robustkit wrote there."
            )
