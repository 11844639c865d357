"""The files of a finished run: weights or a posterior, and then model.json, which marks the run as finished."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from robustkit.checks.relabelled import label_checks
from robustkit.core.errors import RunError
from robustkit.core.flags import Flag
from robustkit.core.writing import write
from robustkit.models.classifier import Classifier
from robustkit.models.strings import ENSEMBLE, ModelString
from robustkit.posterior import FILE as POSTERIOR
from robustkit.posterior import Posterior, UnfinishedPosterior
from robustkit.posterior.stream import write_tensors
from robustkit.runs.environment import environment
from robustkit.runs.report_parts import Rate
from robustkit.runs.run_folder import sha256
from robustkit.runs.spec import dumps
from robustkit.runs.training_record import KEPT, RECORD, WEIGHTS, Trained
from robustkit.training import evaluation
from robustkit.training.averages import averaged_weights
from robustkit.training.checkpoint import PREVIOUS, ModelState, TrainState
from robustkit.training.images import Epoch, ImageSet
from robustkit.training.job import TrainingJob
from robustkit.training.method import Plan
from robustkit.training.nets import Member, architecture_string, flops
from robustkit.training.posterior_method import PosteriorMethod, State, kept_steps
from robustkit.training.quick_diversity import default_threat, oracle_accuracies, quick_diversity
from robustkit.training.wrapping_method import WrappingMethod


def finish(
    job: TrainingJob,
    members: Sequence[Member],
    model_state: ModelState,
    train_state: TrainState,
    train: ImageSet,
    test: ImageSet | None,
) -> None:
    """Write the files of a finished run; it can be called again after a crash at any point."""
    samples: list[dict[str, Any]] = []
    scores: list[Tensor] = []
    method = job.method
    has_posterior = isinstance(method, PosteriorMethod)
    if isinstance(method, PosteriorMethod):
        posterior = _pack(job, method, members[0], train_state, train)
        samples = _facts(method, job.plan, len(posterior))
        for number, facts in enumerate(samples):
            posterior.put(members[0].net, number)
            if test is not None:
                scores.append(evaluation.log_probabilities(members[0].classifier, test))
                facts["accuracy"], facts["loss"] = evaluation.accuracy_and_loss(scores[-1], test.labels)
    else:
        with averaged_weights(model_state.nets, model_state.averages):
            _save(job, members)
            if test is not None:
                scores = [evaluation.log_probabilities(member.classifier, test) for member in members]
    accuracies = [evaluation.accuracy_and_loss(one, test.labels)[0] for one in scores] if test is not None else []
    accuracy, flags = (None, []) if test is None else _tested(scores, test, job.plan.classes)
    classifiers = [member.classifier for member in members]
    mean, std = (
        None if value is None else value.flatten().tolist() for value in (classifiers[0].mean, classifiers[0].std)
    )
    arch, file = architecture_string(classifiers), POSTERIOR if has_posterior else WEIGHTS
    record = Trained(
        run_id=job.spec.run_id,
        arch=arch,
        mean=mean and [round(number, 6) for number in mean],
        std=std and [round(number, 6) for number in std],
        classes=job.plan.classes,
        method=job.spec.method,
        data=str(job.spec.data["string"]),
        spec=json.loads(dumps(job.spec)),
        members=job.plan.members,
        history=train_state.history,
        samples=samples,
        accuracy=accuracy,
        member_accuracy=[] if has_posterior else accuracies,
        input=[train.channels, *train.pixels.shape[1:3]] if isinstance(method, WrappingMethod) else None,
        cost=_cost(arch, classifiers, train_state, train),
        hashes={file: sha256(job.folder / file)},
        environment=environment(train.pixels.device, job.spec.precision, None) | {"parts": train_state.versions},
        class_names=job.class_names,
        flags=[*job.flags, *flags],
    )
    write(job.folder / RECORD, (dumps(record.to_json(), indent=2) + "\n").encode())
    shutil.rmtree(job.folder / KEPT, ignore_errors=True)
    (job.folder / PREVIOUS).unlink(missing_ok=True)


def _tested(scores: Sequence[Tensor], test: ImageSet, classes: int) -> tuple[dict[str, Any], list[Flag]]:
    """Return the test accuracy of the mean probabilities with its interval, and flags on the labels."""
    predictions = evaluation.mean_of_probabilities(scores).argmax(1)
    hits = int((predictions == test.labels).sum())
    flags = label_checks(predictions.tolist(), test.labels.tolist(), classes)
    return json.loads(dumps(Rate.of(hits, len(test)))), flags


def _cost(
    arch: str, classifiers: Sequence[Classifier], train_state: TrainState, train: ImageSet
) -> dict[str, float]:
    """Return the passes, floating-point operations and seconds of the run."""
    # Members of one architecture have the same cost.
    counted = classifiers if ModelString.parse(arch).kind == ENSEMBLE else classifiers[:1]
    per_image = sum(flops(one.eval(), train.at(slice(0, 1))) for one in counted) // len(counted)
    passes = train_state.pass_counts
    return {
        "forwards": passes.forwards,
        "backwards": passes.backwards,
        # A backward pass computes the gradients of the input and of the weights of every layer.
        "flops": per_image * (passes.forwards + 2 * passes.backwards),
        "seconds": train_state.seconds,
    }


def test_metrics(members: Sequence[Member], model_state: ModelState, test: ImageSet) -> dict[str, float]:
    """Return the current test accuracy and loss; those of the mean probabilities if there are several nets."""
    with averaged_weights(model_state.nets, model_state.averages):
        scores = [evaluation.log_probabilities(member.classifier, test) for member in members]
    accuracy, loss = evaluation.accuracy_and_loss(evaluation.mean_of_probabilities(scores), test.labels)
    facts = {"test_accuracy": accuracy, "test_loss": loss}
    return facts if len(members) == 1 else {**facts, **oracle_accuracies(scores, test.labels)}


def diversity_metrics(
    job: TrainingJob, members: Sequence[Member], model_state: ModelState, test: ImageSet
) -> dict[str, float]:
    """Return the diversity estimates of several nets as they are now (`quick_diversity`)."""
    with averaged_weights(model_state.nets, model_state.averages):
        nets = [member.classifier for member in members]
        return quick_diversity(nets, test, job.plan.samples, default_threat(str(job.spec.data["string"])))


def _pack(
    job: TrainingJob, method: PosteriorMethod, member: Member, train_state: TrainState, train: ImageSet
) -> Posterior:
    """Return the posterior of the method's samples, made from the kept states."""
    if (job.folder / POSTERIOR).is_file():
        return Posterior.open(job.folder)
    UnfinishedPosterior(job.folder / KEPT).require(train_state.kept)
    order = Epoch.of(train, job.plan, job.plan.epochs, ()).order
    draft, count = UnfinishedPosterior(job.folder), 0
    for state in method.samples(_kept(job.folder / KEPT), job.plan):
        if method.batch_norm == "re-estimate":
            member.net.load_state_dict(state)
            evaluation.re_estimate_batch_norms(member, train, min(job.plan.batch_size, len(train)), order)
            state = member.net.state_dict()
        draft.add(state, count)
        count += 1
    draft.keep(count)
    return draft.pack()


def _kept(folder: Path) -> Iterator[State]:
    draft = UnfinishedPosterior(folder)
    for number in range(len(draft)):
        yield draft.state(number)


def _facts(method: PosteriorMethod, plan: Plan, count: int) -> list[dict[str, Any]]:
    """Return step, epoch, cycle and rate of each sample that is a state of the run; None for drawn samples."""
    empty = {"step": None, "epoch": None, "cycle": None, "rate": None, "accuracy": None, "loss": None}
    if type(method).samples is not PosteriorMethod.samples:
        return [dict(empty) for _ in range(count)]
    return [
        {
            **empty,
            "step": step + 1,
            "epoch": step // plan.steps_per_epoch + 1,
            "cycle": method.cycle(step, plan) + 1,
            "rate": method.rate(step, plan),
        }
        for step in kept_steps(method, plan, plan.steps)
    ]


def _save(job: TrainingJob, members: Sequence[Member]) -> None:
    """Write the weights: of one net under its own names, of several nets with the member's number as a prefix."""
    state = {
        f"{number}.{name}" if len(members) > 1 else name: tensor
        for number, member in enumerate(members)
        for name, tensor in member.net.state_dict().items()
    }
    for name, tensor in state.items():
        if not tensor.isfinite().all():
            raise RunError(
                f"the weights have NaN or infinite values in {name!r}: the training has diverged; give a smaller "
                "--lr in another folder."
            )
    classifier = members[0].classifier
    about: Mapping[str, Tensor | None] = {"mean": classifier.mean, "std": classifier.std}
    metadata = {
        name: ",".join(f"{number:g}" for number in value.flatten().tolist())
        for name, value in about.items()
        if value is not None
    }
    metadata |= {
        "arch": architecture_string([member.classifier for member in members]),
        "recipe": dumps(job.spec.method),
        "run": job.spec.run_id,
    }
    write_tensors(job.folder / WEIGHTS, state, metadata)
