"""What a finished run leaves: weights, or a posterior, and model.json, by which it is finished."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from robustkit.checks.relabelled import clean_doubts
from robustkit.core.errors import RunError
from robustkit.core.writing import write
from robustkit.models.strings import ENSEMBLE, ModelString
from robustkit.posterior import FILE as POSTERIOR
from robustkit.posterior import Draft, Posterior
from robustkit.posterior.stream import write_tensors
from robustkit.runs.environment import environment
from robustkit.runs.evaluation_record import Rate, dumps
from robustkit.runs.run_folder import sha256
from robustkit.runs.training_record import KEPT, RECORD, WEIGHTS, Trained
from robustkit.training import evaluation
from robustkit.training.averages import swapped
from robustkit.training.checkpoint import PREVIOUS, ModelState, TrainState
from robustkit.training.images import Epoch, ImageSet
from robustkit.training.method import Plan
from robustkit.training.nets import Member, bare, flops
from robustkit.training.posterior_method import PosteriorMethod, State, kept_steps
from robustkit.training.quick_diversity import oracles, quick_diversity, usual_threat
from robustkit.training.session import Job
from robustkit.training.wrapping_method import WrappingMethod


def finish(
    job: Job,
    members: Sequence[Member],
    parts: ModelState,
    course: TrainState,
    train: ImageSet,
    test: ImageSet | None,
) -> None:
    """Write the files; it may be called again after a crash at any point of it."""
    samples: list[dict[str, Any]] = []
    scores: list[Tensor] = []
    method = job.method
    has_posterior = isinstance(method, PosteriorMethod)
    if isinstance(method, PosteriorMethod):
        posterior = _pack(job, method, members[0], course, train)
        samples = _facts(method, job.plan, len(posterior))
        for number, facts in enumerate(samples):
            posterior.put(members[0].net, number)
            if test is not None:
                scores.append(evaluation.log_probabilities(members[0].classifier, test))
                facts["accuracy"], facts["loss"] = evaluation.accuracy_and_loss(scores[-1], test.labels)
    else:
        with swapped(parts.nets, parts.averages):
            _save(job, members)
            if test is not None:
                scores = [evaluation.log_probabilities(member.classifier, test) for member in members]
    own = [evaluation.accuracy_and_loss(one, test.labels)[0] for one in scores] if test is not None else []
    accuracy, doubts = None, []
    if test is not None:
        said = evaluation.mixed(scores).argmax(1)
        hits = int((said == test.labels).sum())
        accuracy = json.loads(dumps(Rate.of(hits, len(test))))
        doubts = clean_doubts(said.tolist(), test.labels.tolist(), job.plan.classes)
    classifier = members[0].classifier
    mean, std = (None if of is None else of.flatten().tolist() for of in (classifier.mean, classifier.std))
    classifiers = [member.classifier for member in members]
    arch = bare(classifiers)
    # Members of one architecture cost the same.
    counted = classifiers if ModelString.parse(arch).kind == ENSEMBLE else classifiers[:1]
    per_image = sum(flops(one.eval(), train.at(slice(0, 1))) for one in counted) // len(counted)
    tally, file = course.tally, POSTERIOR if has_posterior else WEIGHTS
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
        history=course.history,
        samples=samples,
        accuracy=accuracy,
        member_accuracy=[] if has_posterior else own,
        input=[train.channels, *train.pixels.shape[1:3]] if isinstance(method, WrappingMethod) else None,
        cost={
            "forwards": tally.forwards,
            "backwards": tally.backwards,
            # A backward pass makes the gradients of the input and of the weights of every layer.
            "flops": per_image * (tally.forwards + 2 * tally.backwards),
            "seconds": course.seconds,
        },
        hashes={file: sha256(job.folder / file)},
        environment=environment(train.pixels.device, job.spec.precision, None) | {"parts": course.parts},
        class_names=job.class_names,
        flags=[*job.flags, *doubts],
    )
    write(job.folder / RECORD, (dumps(record.to_json(), indent=2) + "\n").encode())
    shutil.rmtree(job.folder / KEPT, ignore_errors=True)
    (job.folder / PREVIOUS).unlink(missing_ok=True)


def judge(members: Sequence[Member], parts: ModelState, test: ImageSet) -> dict[str, float]:
    """Return accuracy and loss of the nets as they are now: of several that of their mean, and oracles'."""
    with swapped(parts.nets, parts.averages):
        scores = [evaluation.log_probabilities(member.classifier, test) for member in members]
    accuracy, loss = evaluation.accuracy_and_loss(evaluation.mixed(scores), test.labels)
    facts = {"test_accuracy": accuracy, "test_loss": loss}
    return facts if len(members) == 1 else {**facts, **oracles(scores, test.labels)}


def compare(job: Job, members: Sequence[Member], parts: ModelState, test: ImageSet) -> dict[str, float]:
    """Return how far several nets, as they are now, share weaknesses."""
    with swapped(parts.nets, parts.averages):
        nets = [member.classifier for member in members]
        return quick_diversity(nets, test, job.plan.samples, usual_threat(str(job.spec.data["string"])))


def _pack(job: Job, method: PosteriorMethod, member: Member, course: TrainState, train: ImageSet) -> Posterior:
    """Make the method's samples of the states that were kept, and return the posterior of them."""
    if (job.folder / POSTERIOR).is_file():
        return Posterior.open(job.folder)
    Draft(job.folder / KEPT).require(course.kept)
    order = Epoch.of(train, job.plan, job.plan.epochs, ()).order
    draft, count = Draft(job.folder), 0
    for state in method.samples(_kept(job.folder / KEPT), job.plan):
        if method.batch_norm == "re-estimate":
            member.net.load_state_dict(state)
            evaluation.re_estimate(member, train, min(job.plan.batch_size, len(train)), order)
            state = member.net.state_dict()
        draft.add(state, count)
        count += 1
    draft.keep(count)
    return draft.pack()


def _kept(folder: Path) -> Iterator[State]:
    draft = Draft(folder)
    for number in range(len(draft)):
        yield draft.state(number)


def _facts(method: PosteriorMethod, plan: Plan, count: int) -> list[dict[str, Any]]:
    """Return step, epoch, cycle and rate of each sample that is a state of the run; of a drawn one none."""
    nothing = {"step": None, "epoch": None, "cycle": None, "rate": None, "accuracy": None, "loss": None}
    if type(method).samples is not PosteriorMethod.samples:
        return [dict(nothing) for _ in range(count)]
    return [
        {
            **nothing,
            "step": step + 1,
            "epoch": step // plan.steps_per_epoch + 1,
            "cycle": method.cycle(step, plan) + 1,
            "rate": method.rate(step, plan),
        }
        for step in kept_steps(method, plan, plan.steps)
    ]


def _save(job: Job, members: Sequence[Member]) -> None:
    """Write the weights of one net under its own names, of several under numbers in front of them."""
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
        name: ",".join(f"{number:g}" for number in of.flatten().tolist())
        for name, of in about.items()
        if of is not None
    }
    metadata |= {
        "arch": bare([member.classifier for member in members]),
        "recipe": dumps(job.spec.method),
        "run": job.spec.run_id,
    }
    write_tensors(job.folder / WEIGHTS, state, metadata)
