"""The training loop: epochs, steps and checkpoints. Steps do not wait for the device; an epoch waits once."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from robustkit.core.determinism import deterministic_operations
from robustkit.core.devices import ComputeDevice
from robustkit.core.errors import RunError
from robustkit.core.out_of_memory import is_out_of_memory
from robustkit.core.writing import subfolder
from robustkit.posterior import UnfinishedPosterior
from robustkit.runs.training_record import KEPT, RECORD
from robustkit.runs.versions import continued
from robustkit.training import augment, averages, checkpoint, quick_diversity
from robustkit.training.checkpoint import ModelState, TrainState
from robustkit.training.finish import diversity_metrics, finish, test_metrics
from robustkit.training.images import Epoch
from robustkit.training.job import TrainingJob
from robustkit.training.memory import PerturbationMemory
from robustkit.training.method import Method, Plan, ProcessGroup
from robustkit.training.metrics import MISSING, Metrics
from robustkit.training.nets import Member, build, in_channels_last
from robustkit.training.parallel.data_parallel import DataParallel
from robustkit.training.posterior_method import PosteriorMethod
from robustkit.training.progress import TrainProgress

if TYPE_CHECKING:
    from lightning_fabric import Fabric

# Seconds between two checkpoints within an epoch.
SAVE_EVERY = 20.0
# The most evaluations on the test data during a run.
MAX_EVALUATIONS = 20


def run_process(fabric: Fabric, job: TrainingJob) -> str:
    """Train in one process, from the start or the last checkpoint; return the record of the run as JSON."""
    first, record = fabric.global_rank == 0, job.folder / RECORD
    if not fabric.broadcast(first and record.is_file()):
        try:
            with _generators(fabric.device), deterministic_operations(job.deterministic, fabric.device):
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
    """The training of a run in one process, resumed from a checkpoint if there is one."""

    def __init__(self, fabric: Fabric, job: TrainingJob) -> None:
        """Build nets and optimizers, and load the checkpoint if there is one."""
        self.fabric, self.job = fabric, job
        self.plan, self.method = job.plan, job.method
        self.images = job.train.to(fabric.device)
        self.test = None if job.test is None else job.test.to(fabric.device)
        self.state = TrainState(loss=torch.zeros((), device=fabric.device))
        self.group = DataParallel.of(job.parallel, fabric, job.plan.members)
        self.members = [self._member(number, self.group) for number in range(job.plan.members)]
        nets = [member.net for member in self.members]
        weights = [[weight for weight in net.parameters() if weight.requires_grad] for net in nets]
        plans = [own_plan(job.plan, number) for number in range(job.plan.members)]
        self.model_state = ModelState(
            nets=nets,
            optimizers=[job.method.optimizer(own, plan) for own, plan in zip(weights, plans, strict=True)],
            averages=[averages.copy_state(net) for net in nets] if job.spec.ema else [],
            memory=PerturbationMemory.of(self.images, job.plan.members) if job.method.batch_needs.memory else None,
        )
        # One process reads, writes and reports: other hosts may not see new files of a shared folder at once.
        self.first = fabric.global_rank == 0
        self.progress = job.progress if self.first else TrainProgress()
        found = checkpoint.find_checkpoint(job.folder, job.method, job.plan) if self.first else None
        if found is not None and found.damaged:
            self.progress.say(f"{found.damaged}; resuming from the checkpoint before it")
        content = fabric.broadcast(None if found is None else found.content)
        self.resumed = content is not None
        if content is not None:
            checkpoint.load(content, job.folder, self.state, self.model_state)
            if self.first:
                UnfinishedPosterior(job.folder / KEPT).check(self.state.kept)
        self.state.versions = continued(self.state.versions, f"step {self.state.step}")

    def run(self) -> None:
        """Train to the end, and write the files of the finished run."""
        if self.resumed:
            self.progress.say(
                f"resuming {self.job.spec.run_id}: {self.state.step} of {self.plan.steps} steps done"
            )
        self.progress.begin(self.plan.epochs, self.plan.steps_per_epoch, self.plan.batch_size)
        metrics = Metrics(self.job.folder, self.state.history) if self.first else None
        if metrics is not None and metrics.curves is None and not self.resumed:
            self.progress.say(MISSING)
        try:
            while self.state.step < self.plan.steps:
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
        """Write the files of the finished run, in the first process only."""
        members = self.members
        if isinstance(self.method, PosteriorMethod):
            # Samples run in a net of a single process, which does not wait for the others.
            members = [self._member(0, ProcessGroup())]
            members[0].start_step(self.plan.steps)
        finish(self.job, members, self.model_state, self.state, self.images, self.test)

    def _epoch(self) -> dict[str, Any]:
        """Train the rest of the current epoch, write a checkpoint, and return the metrics of the epoch."""
        plan, state = self.plan, self.state
        number, start = divmod(state.step, plan.steps_per_epoch)
        augmentation = augment.components(self.job.spec.augment)
        epoch = Epoch.of(self.images, plan, number, augmentation, self.method.batch_needs.pairs)
        before, started = state.seconds, time.perf_counter()
        saved = started
        for index in range(start, plan.steps_per_epoch):
            self._step(epoch, index)
            now = time.perf_counter()
            state.seconds = before + now - started
            if self.group.agree(now - saved > SAVE_EVERY, index) and index + 1 < plan.steps_per_epoch:
                self._mean_loss(index + 1)
                self.group.synchronise(state, self.model_state)
                if self.first:
                    checkpoint.save(self.job.folder, state, self.model_state)
                saved = now
        loss = self._mean_loss(plan.steps_per_epoch)
        state.loss = torch.zeros_like(state.loss)
        seconds = time.perf_counter() - started
        state.seconds = before + seconds
        facts = {
            "epoch": number + 1,
            "step": state.step,
            "loss": loss,
            "rate": self.method.rate(state.step - 1, plan),
            "images_per_second": (plan.steps_per_epoch - start) * plan.batch_size / seconds,
            "seconds": state.seconds,
        }
        self.group.synchronise(state, self.model_state)
        if self.first:
            if self.test is not None and is_evaluated(number + 1, plan.epochs):
                facts |= test_metrics(self.members, self.model_state, self.test)
            if (
                self.test is not None
                and plan.members > 1
                and is_evaluated(number + 1, plan.epochs, quick_diversity.MAX_EVALUATIONS)
            ):
                facts |= diversity_metrics(self.job, self.members, self.model_state, self.test)
            state.history.append(facts)
            checkpoint.save(self.job.folder, state, self.model_state)
            self.progress.epoch(facts)
        return facts

    def _step(self, epoch: Epoch, index: int) -> None:
        plan, method, state, group = self.plan, self.method, self.state, self.group
        step = state.step
        batch = replace(epoch.batch(index, group.part, group.parts), process_group=group)
        memory, rows = self.model_state.memory, batch.rng.ids
        if memory is not None:
            batch = replace(batch, memory=memory.read(epoch, rows))
        numbers = group.own_members
        own = [self.members[number] for number in numbers]
        nets = [self.model_state.nets[number] for number in numbers]
        optimizers = [self.model_state.optimizers[number] for number in numbers]
        for member in own:
            member.start_step(step)
        repeats = method.batch_needs.repeats
        for _ in range(repeats):
            for optimizer in optimizers:
                optimizer.zero_grad(set_to_none=True)
            loss = method.backward(own, batch, plan)
            state.loss += group.all_reduce(nets, loss) / repeats
            take_step(method, optimizers, step, plan)
        if memory is not None and batch.memory is not None:
            memory.write(epoch, *group.gather_memory(rows, batch.memory))
        if self.model_state.averages:
            for number, net in zip(numbers, nets, strict=True):
                averages.update_average(self.model_state.averages[number], net, self.job.spec.ema)
        state.step += 1
        if isinstance(method, PosteriorMethod) and method.keeps(step, plan):
            if self.first:
                UnfinishedPosterior(subfolder(self.job.folder, KEPT)).add(
                    self.model_state.nets[0].state_dict(), state.kept
                )
            state.kept += 1
        self.progress.step(state.step)

    def _mean_loss(self, steps: int) -> float:
        """Return the mean loss over the first steps of the epoch; RunError if it is not finite."""
        loss = float(self.state.loss) / steps
        if not math.isfinite(loss):
            epoch = (self.state.step - 1) // self.plan.steps_per_epoch + 1
            raise RunError(
                f"the loss is {loss} in epoch {epoch}: the training has diverged; give a smaller --lr in another "
                "folder."
            )
        return loss

    def _member(self, number: int, group: ProcessGroup) -> Member:
        """Return a member with its initial weights, for the process's part of each batch."""
        plan, fabric = self.plan, self.fabric
        sample = self.job.train.at(slice(0, 2))
        job, seed = self.job, plan.seed + number
        classifier = build(job.archs[number], seed, sample, plan.classes, self.method, job.trust_code)
        classifier = in_channels_last(classifier.to(fabric.device).train(), sample.to(fabric.device))
        return Member(classifier, self.state.pass_counts, fabric.autocast, seed, group.part, group.parts).train()


def take_step(method: Method, optimizers: Sequence[torch.optim.Optimizer], step: int, plan: Plan) -> None:
    """Move the weights of the members along their gradients.

    The parameter groups of the optimizers receive the learning rate as `lr`, the step as `counter` and whether it
    adds noise as `noisy`; optimizers of posterior samplers draw their noise as a function of the step.
    """
    rate, noisy = method.rate(step, plan), isinstance(method, PosteriorMethod) and method.noisy(step, plan)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group.update(lr=rate, counter=step, noisy=noisy)
        optimizer.step()


def own_plan(plan: Plan, member: int) -> Plan:
    """Return the plan of one member, with the seed of the member."""
    return replace(plan, seed=plan.seed + member)


def is_evaluated(epoch: int, epochs: int, most: int = MAX_EVALUATIONS) -> bool:
    """Return whether an epoch, from 1, ends with an evaluation: the last one, and at most `most` evenly spaced."""
    return epoch == epochs or epoch % math.ceil(epochs / most) == 0


@contextmanager
def _generators(device: torch.device) -> Iterator[None]:
    """Restore torch's generators afterwards."""
    devices = [] if ComputeDevice(device).is_cpu else [device]
    with torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"):
        yield
