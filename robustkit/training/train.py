"""A training run, from the request to the record."""

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
from robustkit.core.memory import free_memory
from robustkit.data.samples import Samples
from robustkit.models.classifier import Classifier
from robustkit.models.fingerprint import combined_sha256
from robustkit.models.strings import ModelString, joined
from robustkit.registry import spec as record_of
from robustkit.runs.opening import open_for_writing
from robustkit.runs.run_folder import read_trained
from robustkit.runs.training_record import RECORD, Trained, TrainSpec
from robustkit.training import augment, nets
from robustkit.training.images import ImageSet, check_memory
from robustkit.training.job import MethodOptions, TrainingJob
from robustkit.training.loop import run_process
from robustkit.training.method import Method, Plan
from robustkit.training.parallel import data_parallel, processes
from robustkit.training.posterior_method import PosteriorMethod
from robustkit.training.progress import TrainProgress


@dataclass(frozen=True, kw_only=True)
class Training(MethodOptions):
    """A request to train. Values of None are replaced by the method's or the data's default.

    Args:
        samples: the training set.
        device: where to train.
        test: images that the result is evaluated on.
        arch: a model string. The initial weights come from the seed unless it names a file. A folder with several
            members, or `ensemble:[A;B]`, gives the initial weights of each member.
        epochs: passes over the training set.
        batch_size: images per step, summed over all devices.
        lr: the largest learning rate.
        members: nets trained side by side.
        ema: decay, in [0, 1), of a moving average of the weights that is written instead of the last weights; 0
            for none.
        augment: one of `robustkit.training.augment.CHOICES`.
        precision: auto, fp32 or bf16.
        seed: seed of all random numbers.
        devices: devices to use on each host, each with a process of its own.
        deterministic: use deterministic kernels only.
    """

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
    deterministic: bool = False

    def __post_init__(self) -> None:
        """Refuse a request that cannot be trained, before any image is read."""
        if not isinstance(self.method, Method):
            raise UsageError(f"method {self.method!r}: write one of robustkit list methods, e.g. 'standard'.")
        arch: Any = self.arch
        if arch is not None and not isinstance(arch, str):
            kind = type(arch).__name__
            raise UsageError(
                f"arch is a {kind}, and must be a model string, so that the run can be loaded again; "
                "write for example ./net.py:factory."
            )
        data_parallel.check(
            self.parallel, processes.count_processes(self.device, self.devices), self.method, self.plan
        )
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
        signs_per_pixel = self.plan.members if self.method.batch_needs.memory else 0
        check_memory(self.samples, free_memory(self.device), signs_per_pixel)

    @cached_property
    def plan(self) -> Plan:
        """The size of the run: as requested, else the method's default for the number of images."""
        count = len(self.samples)
        requested = (self.epochs, self.batch_size, self.lr)
        names = ("epochs", "batch-size", "lr", "members")
        for name, number in zip(names, (*requested, self.members), strict=True):
            if number is not None and not number > 0:
                raise UsageError(f"--{name} {number:g} must be above 0.")
            if number == float("inf"):
                raise UsageError(f"--{name} {number:g} must be finite.")
            if name != "lr" and number is not None and number != int(number):
                raise UsageError(f"--{name} {number:g} must be a whole number.")
        several = len(self._archs) if len(self._archs) > 1 else None
        default = None if None not in requested and self.members else self.method.default_size(count)
        classes = len(self.samples.classes) if self.samples.classes else int(self.samples.labels.max()) + 1

        def value(number: Any, name: str) -> Any:
            return number if number is not None or default is None else getattr(default, name)

        if several and not self.members and not self.method.ensembles:
            raise UsageError(
                f"--arch {self.arch} names {several} nets and {self.method.info.name} trains one; write one of "
                f"them, as --arch {self._archs[0]}."
            )
        members = self.members or several or value(None, "members")
        if several and members != several:
            raise UsageError(
                f"--arch {self.arch} names {several} nets for --members {members}; write --members {several}, or "
                f"one net to start all from, as --arch {self._archs[0]}."
            )
        return Plan(
            samples=count,
            classes=max(classes, 2),
            batch_size=min(value(self.batch_size, "batch_size"), count),
            epochs=value(self.epochs, "epochs"),
            lr=float(value(self.lr, "lr")),
            members=members,
            seed=self.seed,
        )

    @cached_property
    def images(self) -> ImageSet:
        """The training set in memory."""
        return ImageSet.read(self.samples)

    @cached_property
    def _archs(self) -> list[str]:
        """The model string of each net that `arch` names."""
        return nets.arch_strings(self.arch or nets.default_arch(self.samples.name))

    @cached_property
    def member_archs(self) -> tuple[ModelString, ...]:
        """The complete model string of each member."""
        normalisation = self.images.normalisation()
        specs = [nets.complete_arch(text, self.plan.classes, self.images.channels) for text in self._archs]
        complete = tuple(nets.with_normalisation(spec, *normalisation) for spec in specs)
        return complete if len(complete) > 1 else complete * self.plan.members

    @cached_property
    def initial_members(self) -> list[Classifier]:
        """Members before training: the first one if all have one architecture, else all."""
        specs = self.member_archs if len(self._archs) > 1 else self.member_archs[:1]
        sample = self.images.at(slice(0, 2))
        return nets.build_all(specs, self.seed, sample, self.plan.classes, self.method, self.trust_code)

    @cached_property
    def spec(self) -> TrainSpec:
        """What determines the weights."""
        plan = self.plan
        return TrainSpec(
            method=record_of(self.method),
            arch=_initial_weights(self.initial_members),
            data=_data_record(self.samples),
            test=None if self.test is None else _data_record(self.test),
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
        name = self.augment or augment.default_augmentation(
            self.samples.name, self.images.channels, self.images.height
        )
        augment.components(name)
        return name

    def run(self, folder: Path, progress: TrainProgress | None = None, overwrite: bool = False) -> Trained:
        """Train, resume an unfinished run, or return the record of a finished run.

        Args:
            folder: folder of the run.
            progress: receives the events of the run.
            overwrite: remove the run that the folder contains, and start again.

        Raises:
            UsageError: if the folder contains another run or cannot be written.
            RunError: if training diverges, or a process fails.
        """
        spec, alone = self.spec, processes.is_single_process()
        # Of the processes that a launcher started, one locks the folder and sends its content to the others.
        first = processes.rank() == 0
        progress = progress if progress and first else TrainProgress()
        opened = open_for_writing(folder, spec, overwrite=overwrite, say=progress.say)
        with opened if first else nullcontext():
            finished = first and (folder / RECORD).is_file()
            if finished:
                progress.say(f"{spec.run_id} is finished; this is its record")
            if finished and alone:
                return read_trained(folder)
            job = TrainingJob(
                spec=spec,
                method=self.method,
                plan=self.plan,
                archs=self.member_archs,
                trust_code=self.trust_code,
                train=self.images,
                test=None if self.test is None else ImageSet.read(self.test),
                parallel=self.parallel,
                folder=folder,
                progress=progress,
                class_names=self.samples.classes,
                deterministic=self.deterministic,
                flags=(*self.samples.flags, *(() if self.test is None else self.test.flags)),
            )
            text = processes.launch(self.device, self.devices, spec.precision, partial(run_process, job=job))
        return Trained.from_json(json.loads(text))


def _initial_weights(members: Sequence[Classifier]) -> dict[str, Any]:
    """Return the record of what members start from: model strings and a hash of the weights."""
    if len(members) == 1:
        return {"string": members[0].string, "fingerprint": members[0].fingerprint}
    fingerprint = combined_sha256({"members": [member.fingerprint for member in members]})
    return {"string": joined([member.string for member in members]), "fingerprint": fingerprint}


def _data_record(samples: Samples) -> dict[str, Any]:
    return {"string": samples.name, "n": len(samples), "fingerprint": samples.fingerprint}
