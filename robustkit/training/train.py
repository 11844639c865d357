"""A training run from its request to its record."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from robustkit.core.errors import UsageError
from robustkit.data.samples import Samples
from robustkit.engine.model.profiling import free_memory
from robustkit.models.classifier import Classifier
from robustkit.models.fingerprint import combined_sha256
from robustkit.models.strings import ModelString, joined
from robustkit.registry import spec as record_of
from robustkit.runs.opening import open_for_writing
from robustkit.runs.run_folder import read_trained
from robustkit.runs.training_record import RECORD, Trained, TrainSpec
from robustkit.training import augment, nets
from robustkit.training.images import ImageSet, check_room
from robustkit.training.loop import work
from robustkit.training.method import Method, Plan
from robustkit.training.parallel import data_parallel, processes
from robustkit.training.posterior_method import PosteriorMethod
from robustkit.training.progress import TrainProgress
from robustkit.training.session import Job


@dataclass(frozen=True)
class Training:
    """A request to train; what is None is the method's or the data's usual.

    Attributes:
        method: what to do in each step.
        samples: the training set.
        test: images that the result is judged on.
        arch: a model string; initial weights are the seed's unless it names a file. A folder of several members
            or `ensemble:[A;B]` is where each member starts.
        epochs: passes over the set.
        batch_size: images in a step, over all devices.
        lr: the largest learning rate.
        members: nets trained side by side.
        ema: decay of a moving average that is written instead of the last weights; 0 is none.
        augment: one of `robustkit.training.augment.CHOICES`.
        precision: auto, fp32 or bf16.
        seed: of every random number.
        device: where to train.
        devices: how many of them on each host, each with a process of its own.
        parallel: what processes share, `data` or `members` (`robustkit.training.parallel.data_parallel`).
        trust_code: whether Python code that a run folder names as `arch` is run.
    """

    method: Method
    samples: Samples
    device: torch.device
    test: Samples | None = None
    arch: str | None = None
    epochs: int | None = None
    batch_size: int | None = None
    lr: float | None = None
    members: int | None = None
    ema: float = 0.0
    augment: str | None = None
    precision: str = "auto"
    seed: int = 0
    devices: int = 1
    parallel: str = data_parallel.DATA
    trust_code: bool = False

    def __post_init__(self) -> None:
        """Refuse what cannot be trained, before any image is read."""
        if not isinstance(self.method, Method):
            raise UsageError(f"method {self.method!r}: write one of robustkit list methods, e.g. 'standard'.")
        arch: Any = self.arch
        if arch is not None and not isinstance(arch, str):
            kind = type(arch).__name__
            raise UsageError(
                f"arch is a {kind}, and must be a model string, so that the run can be loaded again; "
                "write for example ./net.py:factory."
            )
        if not 0 <= self.seed < 2**63:
            raise UsageError(f"seed {self.seed}: write a whole number from 0 to 2**63 - 1.")
        data_parallel.check(self.parallel, processes.count(self.device, self.devices), self.method, self.plan)
        if not 0 <= self.ema < 1:
            raise UsageError(f"--ema {self.ema:g} must be from 0 to below 1, e.g. 0.999.")
        if self.ema and isinstance(self.method, PosteriorMethod):
            raise UsageError(
                f"{self.method.info.name} keeps samples of the weights, not their average; leave --ema out."
            )
        highest = -1 if self.test is None else int(self.test.labels.max())
        if self.test is not None and highest >= self.plan.classes:
            raise UsageError(
                f"{self.test.name} has class {highest}, and the training data {self.plan.classes} classes; give "
                "the test data that belongs to it."
            )
        self.method.check_plan(self.plan)
        signs = self.plan.members if self.method.batch_needs.memory else 0
        check_room(self.samples, free_memory(self.device), signs)

    @cached_property
    def plan(self) -> Plan:
        """The run's size: as asked for, else the method's own for so many images."""
        count = len(self.samples)
        asked = (self.epochs, self.batch_size, self.lr)
        for name, number in zip(("epochs", "batch-size", "lr", "members"), (*asked, self.members), strict=True):
            if number is not None and not number > 0:
                raise UsageError(f"--{name} {number:g} must be above 0.")
            if number == float("inf"):
                raise UsageError(f"--{name} {number:g} must be finite.")
            if name != "lr" and number is not None and number != int(number):
                raise UsageError(f"--{name} {number:g} must be a whole number.")
        several = len(self._named) if len(self._named) > 1 else None
        usual = None if None not in asked and self.members else self.method.default_size(count)
        classes = len(self.samples.classes) if self.samples.classes else int(self.samples.labels.max()) + 1

        def of(asked: Any, name: str) -> Any:
            return asked if asked is not None or usual is None else getattr(usual, name)

        if several and not self.members and not self.method.ensembles:
            raise UsageError(
                f"--arch {self.arch} names {several} nets and {self.method.info.name} trains one; write one of "
                f"them, as --arch {self._named[0]}."
            )
        members = self.members or several or of(None, "members")
        if several and members != several:
            raise UsageError(
                f"--arch {self.arch} names {several} nets for --members {members}; write --members {several}, or "
                f"one net to start all from, as --arch {self._named[0]}."
            )
        return Plan(
            samples=count,
            classes=max(classes, 2),
            batch_size=min(of(self.batch_size, "batch_size"), count),
            epochs=of(self.epochs, "epochs"),
            lr=float(of(self.lr, "lr")),
            members=members,
            seed=self.seed,
        )

    @cached_property
    def images(self) -> ImageSet:
        """The training set in memory."""
        return ImageSet.read(self.samples)

    @cached_property
    def _named(self) -> list[str]:
        """The nets that `arch` names."""
        return nets.named(self.arch or nets.usual_arch(self.samples.name))

    @cached_property
    def strings(self) -> tuple[ModelString, ...]:
        """Each member's model string, complete."""
        normalisation = self.images.normalisation()
        specs = [nets.complete(text, self.plan.classes, self.images.channels) for text in self._named]
        whole = tuple(nets.normalised(spec, *normalisation) for spec in specs)
        return whole if len(whole) > 1 else whole * self.plan.members

    @cached_property
    def starts(self) -> list[Classifier]:
        """Before training: the first member, which says what the others are, or each where each has its own."""
        specs = self.strings if len(self._named) > 1 else self.strings[:1]
        sample = self.images.at(slice(0, 2))
        return nets.build_all(specs, self.seed, sample, self.plan.classes, self.method, self.trust_code)

    @cached_property
    def spec(self) -> TrainSpec:
        """What determines the weights."""
        plan = self.plan
        return TrainSpec(
            method=record_of(self.method),
            arch=_origin(self.starts),
            data=_about(self.samples),
            test=None if self.test is None else _about(self.test),
            epochs=plan.epochs,
            batch_size=plan.batch_size,
            lr=plan.lr,
            members=plan.members,
            ema=self.ema,
            augment=self._augment,
            precision=processes.pick_precision(self.precision, self.device),
            seed=self.seed,
        )

    @property
    def _augment(self) -> str:
        name = self.augment or augment.usual(self.samples.name, self.images.channels, self.images.height)
        augment.parts(name)
        return name

    def run(self, folder: Path, progress: TrainProgress | None = None, overwrite: bool = False) -> Trained:
        """Train, or go on, or return the record of a run that is finished.

        Args:
            folder: the run's folder.
            progress: who to tell on the way.
            overwrite: remove the run that the folder holds, and begin anew.

        Raises:
            UsageError: if the folder holds another run or cannot be written.
            RunError: if training diverges, or a process fails.
        """
        spec, alone = self.spec, processes.alone()
        # Of the processes that a launcher started one holds the folder, and tells the others.
        first = processes.rank() == 0
        progress = progress if progress and first else TrainProgress()
        opened = open_for_writing(folder, spec, overwrite=overwrite, say=progress.say)
        with opened if first else nullcontext():
            finished = first and (folder / RECORD).is_file()
            if finished:
                progress.say(f"{spec.run_id} is finished; this is its record")
            if finished and alone:
                return read_trained(folder)
            job = Job(
                spec=spec,
                method=self.method,
                plan=self.plan,
                archs=self.strings,
                trust_code=self.trust_code,
                train=self.images,
                test=None if self.test is None else ImageSet.read(self.test),
                parallel=self.parallel,
                folder=folder,
                progress=progress,
                class_names=self.samples.classes,
                flags=(*self.samples.flags, *(() if self.test is None else self.test.flags)),
            )
            text = processes.launch(self.device, self.devices, spec.precision, partial(work, job=job))
        return Trained.from_json(json.loads(text))


def _origin(starts: Sequence[Classifier]) -> dict[str, Any]:
    """Return what members start from."""
    if len(starts) == 1:
        return {"string": starts[0].string, "fingerprint": starts[0].fingerprint}
    whole = combined_sha256({"members": [one.fingerprint for one in starts]})
    return {"string": joined([one.string for one in starts]), "fingerprint": whole}


def _about(samples: Samples) -> dict[str, Any]:
    return {"string": samples.name, "n": len(samples), "fingerprint": samples.fingerprint}
