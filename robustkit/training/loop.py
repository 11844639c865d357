"""The loop: epochs of steps, checkpoints on the way. A step does not wait for the device; an epoch does, once."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from robustkit.core.errors import RunError
from robustkit.core.writing import subfolder
from robustkit.engine.failures import is_out_of_memory
from robustkit.posterior import Draft
from robustkit.runs.training_record import KEPT, RECORD
from robustkit.runs.versions import continued
from robustkit.training import augment, averages, checkpoint, quick_diversity
from robustkit.training.checkpoint import ModelState, TrainState
from robustkit.training.finish import compare, finish, judge
from robustkit.training.images import Epoch
from robustkit.training.memory import Memory
from robustkit.training.method import Method, Plan, ProcessGroup
from robustkit.training.metrics import MISSING, Metrics
from robustkit.training.nets import Member, build, laid_out
from robustkit.training.parallel.data_parallel import DataParallel
from robustkit.training.posterior_method import PosteriorMethod
from robustkit.training.progress import TrainProgress
from robustkit.training.session import Job

if TYPE_CHECKING:
    from lightning_fabric import Fabric

# Seconds after which a checkpoint is written within an epoch.
SAVE_EVERY = 20.0
# A run looks at its test data so many times at most.
LOOKS = 20


def work(fabric: Fabric, job: Job) -> str:
    """Train in one process, from the beginning or the last checkpoint; return the finished run's record."""
    first, record = fabric.global_rank == 0, job.folder / RECORD
    if not fabric.broadcast(first and record.is_file()):
        try:
            with _generators(fabric.device):
                TrainingSession(fabric, job).run()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise RunError(
                "out of memory in training; give a smaller --batch-size with another --out, or a device with more "
                "memory."
            ) from error
    text: str = fabric.broadcast(record.read_text(encoding="utf-8") if first else "")
    return text


class TrainingSession:
    """One process at work on a run, from where an earlier sitting left it."""

    def __init__(self, fabric: Fabric, job: Job) -> None:
        """Build everything, and take up the checkpoint if there is one."""
        self.fabric, self.job = fabric, job
        self.plan, self.method = job.plan, job.method
        self.images = job.train.to(fabric.device)
        self.test = None if job.test is None else job.test.to(fabric.device)
        self.course = TrainState(loss=torch.zeros((), device=fabric.device))
        self.share = DataParallel.of(job.parallel, fabric, job.plan.members)
        self.members = [self._member(number, self.share) for number in range(job.plan.members)]
        nets = [member.net for member in self.members]
        weights = [[weight for weight in net.parameters() if weight.requires_grad] for net in nets]
        plans = [own_plan(job.plan, number) for number in range(job.plan.members)]
        self.parts = ModelState(
            nets=nets,
            optimizers=[job.method.optimizer(own, plan) for own, plan in zip(weights, plans, strict=True)],
            averages=[averages.start(net) for net in nets] if job.spec.ema else [],
            memory=Memory.of(self.images, job.plan.members) if job.method.batch_needs.memory else None,
        )
        # Of several processes one reads, writes and speaks: not every host sees what is new in a folder at once.
        self.first = fabric.global_rank == 0
        self.progress = job.progress if self.first else TrainProgress()
        found = checkpoint.read(job.folder, job.method, job.plan) if self.first else None
        if found is not None and found.damaged:
            self.progress.say(f"{found.damaged}; going on from the checkpoint before it")
        left = fabric.broadcast(None if found is None else found.content)
        self.resumed = left is not None
        if left is not None:
            checkpoint.load(left, job.folder, self.course, self.parts)
            if self.first:
                Draft(job.folder / KEPT).check(self.course.kept)
        self.course.parts = continued(self.course.parts, f"step {self.course.step}")

    def run(self) -> None:
        """Train to the end, and write what a finished run leaves."""
        if self.resumed:
            self.progress.say(
                f"resuming {self.job.spec.run_id}: {self.course.step} of {self.plan.steps} steps done"
            )
        self.progress.begin(self.plan.epochs, self.plan.steps_per_epoch, self.plan.batch_size)
        metrics = Metrics(self.job.folder, self.course.history) if self.first else None
        if metrics is not None and metrics.curves is None and not self.resumed:
            self.progress.say(MISSING)
        try:
            while self.course.step < self.plan.steps:
                facts = self._epoch()
                if metrics is not None:
                    metrics.add(facts)
            if self.first:
                self._finish()
        finally:
            if metrics is not None:
                metrics.close()
            self.progress.close()

    def _finish(self) -> None:
        """Write what a finished run leaves, in the first process alone."""
        members = self.members
        if isinstance(self.method, PosteriorMethod):
            # Samples pass through a net that waits for no other process and counts as one.
            members = [self._member(0, ProcessGroup())]
            members[0].begin(self.plan.steps)
        finish(self.job, members, self.parts, self.course, self.images, self.test)

    def _epoch(self) -> dict[str, Any]:
        """Do what is left of the epoch that the run is in, save it, and return its facts."""
        plan, course = self.plan, self.course
        number, start = divmod(course.step, plan.steps_per_epoch)
        moved = augment.parts(self.job.spec.augment)
        epoch = Epoch.of(self.images, plan, number, moved, self.method.batch_needs.pairs)
        before, begun = course.seconds, time.perf_counter()
        saved = begun
        for place in range(start, plan.steps_per_epoch):
            self._step(epoch, place)
            now = time.perf_counter()
            course.seconds = before + now - begun
            if self.share.agreed(now - saved > SAVE_EVERY, place) and place + 1 < plan.steps_per_epoch:
                self._mean_loss(place + 1)
                self.share.collect(course, self.parts)
                if self.first:
                    checkpoint.save(self.job.folder, course, self.parts)
                saved = now
        loss = self._mean_loss(plan.steps_per_epoch)
        course.loss = torch.zeros_like(course.loss)
        seconds = time.perf_counter() - begun
        course.seconds = before + seconds
        facts = {
            "epoch": number + 1,
            "step": course.step,
            "loss": loss,
            "rate": self.method.rate(course.step - 1, plan),
            "images_per_second": (plan.steps_per_epoch - start) * plan.batch_size / seconds,
            "seconds": course.seconds,
        }
        self.share.collect(course, self.parts)
        if self.first:
            if self.test is not None and _looks(number + 1, plan.epochs):
                facts |= judge(self.members, self.parts, self.test)
            if (
                self.test is not None
                and plan.members > 1
                and _looks(number + 1, plan.epochs, quick_diversity.LOOKS)
            ):
                facts |= compare(self.job, self.members, self.parts, self.test)
            course.history.append(facts)
            checkpoint.save(self.job.folder, course, self.parts)
            self.progress.epoch(facts)
        return facts

    def _step(self, epoch: Epoch, place: int) -> None:
        plan, method, course, share = self.plan, self.method, self.course, self.share
        step = course.step
        batch = replace(epoch.batch(place, share.part, share.parts), peers=share)
        memory, rows = self.parts.memory, batch.rng.ids
        if memory is not None:
            batch = replace(batch, memory=memory.read(epoch, rows))
        own = [self.members[number] for number in share.own]
        optimizers = [self.parts.optimizers[number] for number in share.own]
        for member in own:
            member.begin(step)
        repeats = method.batch_needs.repeats
        for _ in range(repeats):
            for optimizer in optimizers:
                optimizer.zero_grad(set_to_none=True)
            loss = method.backward(own, batch, plan)
            course.loss += share.settle([member.net for member in own], loss) / repeats
            for optimizer in optimizers:
                take_step(method, optimizer, step, plan)
        if memory is not None and batch.memory is not None:
            memory.write(epoch, *share.remembered(rows, batch.memory))
        if self.parts.averages:
            for number in share.own:
                averages.advance(self.parts.averages[number], self.parts.nets[number], self.job.spec.ema)
        course.step += 1
        if isinstance(method, PosteriorMethod) and method.keeps(step, plan):
            if self.first:
                Draft(subfolder(self.job.folder, KEPT)).add(self.parts.nets[0].state_dict(), course.kept)
            course.kept += 1
        self.progress.step(course.step)

    def _mean_loss(self, steps: int) -> float:
        """Return the epoch's mean loss so far; RunError if it is not finite."""
        loss = float(self.course.loss) / steps
        if not math.isfinite(loss):
            epoch = (self.course.step - 1) // self.plan.steps_per_epoch + 1
            raise RunError(
                f"the loss is {loss} in epoch {epoch}: the training has diverged; give a smaller --lr in another "
                "folder."
            )
        return loss

    def _member(self, number: int, peers: ProcessGroup) -> Member:
        """Return a member as it begins, which sees its process's part of each batch."""
        plan, fabric = self.plan, self.fabric
        sample = self.job.train.at(slice(0, 2))
        job, seed = self.job, plan.seed + number
        classifier = build(job.archs[number], seed, sample, plan.classes, self.method, job.trust_code)
        classifier = laid_out(classifier.to(fabric.device).train(), sample.to(fabric.device))
        return Member(classifier, self.course.tally, fabric.autocast, seed, peers.part, peers.parts).train()


def take_step(method: Method, optimizer: torch.optim.Optimizer, step: int, plan: Plan) -> None:
    """Move the weights of one member along their gradients.

    The parameter groups of the optimizer receive the learning rate as `lr`, the step as `counter` and whether it
    adds noise as `noisy`; optimizers of posterior samplers draw their noise as a function of the step.
    """
    for group in optimizer.param_groups:
        group["lr"] = method.rate(step, plan)
        group["counter"] = step
        group["noisy"] = isinstance(method, PosteriorMethod) and method.noisy(step, plan)
    optimizer.step()


def own_plan(plan: Plan, member: int) -> Plan:
    """Return the plan of one member: its seed is its own."""
    return replace(plan, seed=plan.seed + member)


def _looks(epoch: int, epochs: int, most: int = LOOKS) -> bool:
    return epoch == epochs or epoch % math.ceil(epochs / most) == 0


@contextmanager
def _generators(device: torch.device) -> Iterator[None]:
    """Leave torch's generators as the caller had them."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        yield
