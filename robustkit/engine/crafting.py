"""One craft run: images made on surrogates batch by batch into a ledger, then judged on other models."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from robustkit import registry
from robustkit.crafted import CHOICES, Craft, CraftSpec, Forecast, Judgement, Point, Saved
from robustkit.data.samples import Samples
from robustkit.engine import budgets, folder, lattice
from robustkit.engine.ensemble import Ensemble, Storage
from robustkit.engine.environment import environment
from robustkit.engine.nets import Net, gather, same_classes
from robustkit.engine.progress import Progress
from robustkit.engine.sanity import refuse_endless
from robustkit.engine.targets import Jury
from robustkit.engine.worker import NO_MEMORY
from robustkit.errors import RunError, UsageError, did_you_mean
from robustkit.goal import Goal
from robustkit.isolation import own_randomness
from robustkit.ledger import Chunk, Ledger, Verdict
from robustkit.record import Rate
from robustkit.rng import RowRng
from robustkit.shapes import Images
from robustkit.surrogates import COMBINATIONS, Surrogates
from robustkit.threat import ThreatModel
from robustkit.transfer import Composition, compose

BATCH_CPU, BATCH_GPU = 64, 256
# How many of the run's images the others may be mixed with.
POOL = 256
DEFAULT_ATTACK, DEFAULT_COMBINE = "auto", "gradients"
# Stages of the ledger: the goals, the images, and from the third on those without one surrogate each.
GOALS, IMAGES, WITHOUT = 0, 1, 2


@dataclass(frozen=True)
class Crafting:
    """What to craft and how. `run` does it; `spec` says what it is, before anything has run.

    `streaming` has one net in memory at a time, or all with False; None decides by the memory there is. Neither it
    nor `batch_size` changes what is crafted, up to float rounding, and neither is part of the identity.
    """

    nets: Sequence[Net]
    samples: Samples
    threat: ThreatModel
    attack: str = DEFAULT_ATTACK
    combine: str = DEFAULT_COMBINE
    weights: Sequence[float] | None = None
    targeted: str | None = None
    seed: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    batch_size: int | None = None
    streaming: bool | None = None

    def __post_init__(self) -> None:
        """Refuse settings that cannot be meant."""
        if not self.nets:
            raise UsageError("no surrogate to craft on; give at least one with --surrogate.")
        if self.combine not in COMBINATIONS:
            raise did_you_mean("combination", self.combine, COMBINATIONS)
        if self.targeted is not None and self.targeted not in CHOICES:
            raise did_you_mean("choice of target classes", self.targeted, CHOICES)
        if self.batch_size is not None and self.batch_size < 1:
            raise UsageError(f"batch size {self.batch_size}: write at least 1, or auto.")
        if not len(self.samples):
            raise UsageError(f"{self.samples.name} holds no images.")
        if not 0 <= self.seed < 2**63:
            raise UsageError(f"seed {self.seed}: write a whole number from 0 to 2**63 - 1.")
        if self.parts[0].info.coupled:
            raise UsageError(
                f"attack {self.attack!r} draws its random numbers by the batch, so a resumed run would differ; "
                "craft with one of our own, such as mi-fgsm."
            )
        Surrogates([lambda x: x] * len(self.nets), self.combine, self.weights)
        refuse_endless(self.threat, tuple(self.samples.images([0]).shape[1:]))

    @cached_property
    def parts(self) -> list[Any]:
        """The attack and its techniques."""
        return registry.parse_attack(self.attack, self.threat.norm)

    @cached_property
    def composed(self) -> Any:
        """The attack as it is called."""
        return compose(self.parts)

    @cached_property
    def spec(self) -> CraftSpec:
        """Everything that determines the images."""
        one = isinstance(self.composed, Composition)
        body = self.composed.spec() if one else {**registry.spec(self.composed), "techniques": []}
        return CraftSpec(
            surrogates=[net.identity for net in self.nets],
            combine=self.combine,
            weights=None if self.weights is None else [float(weight) for weight in self.weights],
            attack={"string": self.attack, **body},
            targeted=self.targeted,
            data={
                "string": self.samples.name,
                "n": len(self.samples),
                "fingerprint": self.samples.fingerprint,
            },
            threat=str(self.threat),
            seed=self.seed,
        )

    def run(
        self,
        out: Path | None = None,
        targets: Sequence[Net] = (),
        *,
        forecast: bool = False,
        curve: Sequence[int] = (),
        png: Path | None = None,
        progress: Progress | None = None,
    ) -> Craft:
        """Craft, or resume, or take the stored images of a finished run; then judge them.

        Args:
            out: the run folder; without one nothing is written.
            targets: models to judge the images on, beside those judged in earlier runs.
            forecast: leave each surrogate out in turn, craft on the others, and judge on it.
            curve: gradient budgets to craft at as well.
            png: a folder for the images as 8-bit files.
            progress: who to tell on the way.

        Raises:
            UsageError: for a request that cannot be carried out.
            RunError: when it fails on the way; the same call resumes.
        """
        same_classes(self.nets, targets)
        if forecast and len(self.nets) < 2:
            raise UsageError("a forecast leaves one surrogate out in turn; give at least two with --surrogate.")
        progress = progress or Progress()
        with folder.open_for_writing(out, self.spec) if out else nullcontext():
            try:
                return _Job(self, out, targets, progress).run(forecast, list(curve), png)
            finally:
                progress.close()


class _Job:
    """One call of `Crafting.run`."""

    def __init__(self, plan: Crafting, out: Path | None, targets: Sequence[Net], progress: Progress) -> None:
        self.plan, self.out, self.targets, self.progress = plan, out, targets, progress
        self.samples, self.threat = plan.samples, plan.threat
        self.n = len(plan.samples)
        self.batch = min(plan.batch_size or (BATCH_CPU if plan.device.type == "cpu" else BATCH_GPU), self.n)
        self._ensemble: Ensemble | None = None

    def run(self, forecast: bool, curve: list[int], png: Path | None) -> Craft:
        record = self._stored()
        if record is None or self._work_left(record, forecast, curve):
            with Ledger.open(self.out and self.out / folder.LEDGER, self.plan.spec.run_id) as self.ledger:
                if record is None:
                    record = self._main()
                record = self._judge(record)
                if forecast and record.forecast is None:
                    record = self._forecast(record)
                known = [point.budget for point in record.budgets or ()]
                if wanted := sorted({*known, *curve}):
                    record = self._curve(record, wanted)
                self.ledger.seal()
        else:
            self.progress.say(f"run {record.run_id} was finished before; this is its stored result")
        if png is not None:
            record = self._keep(self._png(record, png))
        return record

    def _stored(self) -> Craft | None:
        if self.out is None or not folder.is_craft(self.out):
            return None
        record = folder.read_craft(self.out)
        if broken := folder.broken_seals(self.out, record):
            raise RunError(f"{broken[0]} Give another --out folder to craft anew.")
        return replace(record, adversarial=folder.read_adversarial(self.out))

    def _work_left(self, record: Craft, forecast: bool, curve: list[int]) -> bool:
        points = record.budgets or ()
        unknown = set(curve) - {point.budget for point in points}
        # Targets may have come later, by `robustkit transfer`.
        short = any(point.steps and len(point.success) < len(record.targets) for point in points)
        return bool(
            (forecast and not record.forecast) or unknown or (curve and short) or self._targets_missing(record)
        )

    def _targets_missing(self, record: Craft | None) -> list[Net]:
        known = {one.fingerprint for one in record.targets} if record else set()
        return [net for net in self.targets if net.fingerprint not in known]

    # --- crafting

    @property
    def ensemble(self) -> Ensemble:
        """The surrogates, loaded and tuned when first asked for."""
        if self._ensemble is None:
            plan = self.plan
            storage = Storage.of(plan.nets, self.batch, plan.device, plan.streaming)
            self._ensemble = Ensemble(plan.nets, plan.device, storage, plan.combine, plan.weights)
            x = self.samples.images(np.arange(self.batch)).to(plan.device)
            self._ensemble.tune(x, lambda ways: self.ledger.note("ways", ways), hooked=self._hooked())
        return self._ensemble

    def _surrogates(self, members: Sequence[int] | None = None) -> Surrogates:
        """Return the surrogates, or some, with the run's first images for techniques that mix others in."""
        pool = self.samples.images(np.arange(min(POOL, self.n))).to(self.plan.device)
        return replace(self.ensemble.surrogates(members), pool=pool)

    def _hooked(self) -> bool:
        bare = Surrogates([lambda x: x] * len(self.plan.nets), pool=torch.zeros(1, 1, 1, 1))
        for technique in self.plan.parts[1:]:
            bare = technique.prepare(bare)
        return bool(bare.around)

    def _main(self) -> Craft:
        plan = self.plan
        done = len(self.ledger.said(IMAGES))
        if done:
            self.progress.say(f"resuming {plan.spec.run_id}: {done} of {self.n} images done")
        goals = self._goals()
        self._fill(IMAGES, plan.composed, None, goals, plan.spec.attack_name)
        forwards, backwards, seconds = self.ledger.cost(IMAGES)
        crafted = list(self.ledger.crafted(IMAGES))
        shape = tuple(self.samples.images([0]).shape[1:])
        rows = folder.Adversarials(
            np.arange(self.n, dtype=np.int64),
            self.samples.labels.astype(np.int64),
            shape,
            lambda: iter([image for _, _, image in crafted]),
        )
        if self.out is not None:
            folder.write_adversarial(self.out, rows)
        ensemble = self.ensemble
        surroundings = environment(plan.device, "fp32", self.batch) | {
            "loaded": ensemble.storage.loaded,
            "held": ensemble.storage.held,
            "ways": ensemble.ways,
        }
        return Craft(
            run_id=plan.spec.run_id,
            spec=plan.spec,
            n=self.n,
            gradients_per_image=backwards / self.n,
            forwards_per_image=forwards / self.n,
            seconds=seconds,
            labels=self.samples.labels.tolist(),
            goals=goals,
            not_finite=self._not_finite(),
            surrogates=[],
            targets=[],
            environment=surroundings,
            adversarial=rows.arrays(),
        )

    def _goals(self) -> list[int] | None:
        """Return the class wanted of each image, from the ledger or chosen now."""
        plan = self.plan
        if plan.targeted is None:
            return None
        if len(said := self.ledger.said(GOALS)) == self.n:
            return [wanted for _, wanted in said]
        classes = plan.nets[0].classes
        labels = torch.from_numpy(self.samples.labels.astype(np.int64))
        if plan.targeted == "next":
            wanted = (labels + 1) % classes
        elif plan.targeted == "random":
            draws = RowRng(plan.seed, "goals", torch.arange(self.n)).integers(classes - 1, 1)[:, 0]
            wanted = (labels + 1 + draws) % classes
        else:
            wanted = self._least_likely(labels)
        rows = [
            Verdict(place, int(label), int(goal), 0.0, False, "")
            for place, (label, goal) in enumerate(zip(labels.tolist(), wanted.tolist(), strict=True))
        ]
        self.ledger.write(Chunk(GOALS, 0, 0, 0, 0.0, rows))
        return [int(goal) for goal in wanted]

    def _least_likely(self, labels: torch.Tensor) -> torch.Tensor:
        found = []
        with self.ensemble.at_rest(), torch.no_grad(), own_randomness(self.plan.seed, "goals"):
            for begin in range(0, self.n, self.batch):
                at = np.arange(begin, min(begin + self.batch, self.n))
                logits = self.ensemble.surrogates()(self.samples.images(at).to(self.plan.device)).cpu()
                logits[torch.arange(len(at)), labels[at]] = torch.inf
                found.append(logits.argmin(1))
        return torch.cat(found)

    def _fill(
        self, stage: int, attack: Any, members: Sequence[int] | None, goals: Sequence[int] | None, name: str
    ) -> None:
        """Craft those images of a stage that the ledger has not yet, batch by batch."""
        done = {position for position, _ in self.ledger.said(stage)}
        waiting = np.array([place for place in range(self.n) if place not in done], np.int64)
        if not len(waiting):
            return
        surrogates = self._surrogates(members)
        fooled = sum(hit for _, hit, _ in self.ledger.crafted(stage))
        self.progress.stage(name, self.n, self.n - fooled, self.n)
        self.progress.advance(len(done), self.n - fooled)
        with self.ensemble.at_rest(), own_randomness(self.plan.seed, "craft", stage):
            while len(waiting):
                at = waiting[: self.batch]
                try:
                    chunk = self._chunk(stage, attack, surrogates, goals, at)
                except (torch.OutOfMemoryError, MemoryError) as error:
                    if len(at) == 1:
                        raise RunError(NO_MEMORY) from error
                    self.batch = len(at) // 2
                    self.progress.say(f"out of memory: going on with {self.batch} images at a time")
                    continue
                self.ledger.write(chunk)
                waiting = waiting[len(at) :]
                fooled += sum(verdict.fooled for verdict in chunk.verdicts)
                self.progress.advance(self.n - len(waiting), self.n - fooled)

    def _chunk(
        self, stage: int, attack: Any, surrogates: Surrogates, goals: Sequence[int] | None, at: np.ndarray
    ) -> Chunk:
        device = self.plan.device
        begun, before = time.perf_counter(), self.ensemble.counts
        x = self.samples.images(at).to(device)
        labels = torch.from_numpy(self.samples.labels[at].astype(np.int64)).to(device)
        wanted = None if goals is None else torch.tensor([goals[place] for place in at], device=device)
        goal = Goal(labels, wanted)
        rng = RowRng(self.plan.seed, "craft", torch.from_numpy(at).to(device))
        found = attack(surrogates, x, goal, self.threat, rng=rng)
        x_adv, finite = self._inside(found.detach().to(x), x)
        forwards, backwards = (now - then for now, then in zip(self.ensemble.counts, before, strict=True))
        with torch.no_grad():
            logits = surrogates(x_adv)
        hit = goal.reached(logits).tolist()
        said, clean = logits.argmax(1).tolist(), x.float().cpu().numpy()
        rows = [
            Verdict(
                int(place),
                int(self.samples.labels[place]),
                said[row] if finite[row] else -1,
                0.0,
                bool(hit[row]),
                hashlib.sha256(clean[row].tobytes()).hexdigest(),
                image.tobytes(),
            )
            for row, (place, image) in enumerate(zip(at, x_adv.float().cpu().numpy(), strict=True))
        ]
        return Chunk(stage, int(at[0]), forwards, backwards, time.perf_counter() - begun, rows)

    def _inside(self, found: Images, x: Images) -> tuple[Images, list[bool]]:
        """Return the images inside ball and box, whatever an attack returned; the clean one for NaN."""
        finite = found.flatten(1).isfinite().all(1)
        whole = torch.where(finite.view(-1, *[1] * (x.dim() - 1)), found, x)
        point = self.threat.project(whole, x)
        if not bool(self.threat.contains(point, x).all()):
            raise RunError(f"an image could not be brought inside {self.threat}; this is a fault of robustkit.")
        return point, finite.tolist()

    def _not_finite(self) -> int:
        return sum(said == -1 for _, said in self.ledger.said(IMAGES))

    # --- judging

    def _jury(self, goals: Sequence[int] | None) -> Jury:
        return Jury(self.samples, self.threat, goals, self.plan.seed, self.plan.device)

    def _judge(self, record: Craft) -> Craft:
        jury = self._jury(record.goals)
        images = self._images(IMAGES)
        if not record.surrogates:
            own: list[Judgement] = []
            self.progress.stage("surrogates", self.n * len(self.plan.nets), self.n, self.n)
            for number, net in enumerate(self.plan.nets):
                own.append(jury.judge(net, images, floors=False))
                self.progress.advance(self.n * (number + 1), self.n)
            record = self._keep(replace(record, surrogates=own))
        missing = self._targets_missing(record)
        self.progress.stage("targets", self.n * max(len(missing), 1), self.n, self.n)
        for number, net in enumerate(missing):
            record = self._keep(record.judged([jury.judge(net, images, floors=True)]))
            self.progress.advance(self.n * (number + 1), self.n)
        return record

    def _forecast(self, record: Craft) -> Craft:
        jury = self._jury(record.goals)
        members = range(len(self.plan.nets))
        fooled, backwards = [], 0
        for left in members:
            stage = WITHOUT + left
            others = [number for number in members if number != left]
            self._fill(stage, self.plan.composed, others, record.goals, f"without {left + 1} of {len(members)}")
            backwards += self.ledger.cost(stage)[1]
            judged = jury.judge(self.plan.nets[left], self._images(stage), floors=False)
            fooled.append(judged.fooled(record.labels, record.goals))
        return self._keep(replace(record, forecast=Forecast.of(fooled, backwards / self.n)))

    def _curve(self, record: Craft, wanted: list[int]) -> Craft:
        if not record.targets:
            raise UsageError("--budgets needs a model to judge the images on; give one with --target.")
        old = {point.budget: point for point in record.budgets or ()}
        same = all(len(point.success) in (0, len(record.targets)) for point in old.values())
        if same and set(wanted) <= old.keys():
            return record
        prices = budgets.Prices.of(self.plan.composed, lambda attack: self._spend(attack, record.goals))
        jury = self._jury(record.goals)
        points: list[Point] = []
        for budget in wanted:
            point, attack = prices.point(self.plan.composed, budget)
            if attack is not None:
                stage = budgets.STAGE + budget
                self._fill(stage, attack, None, record.goals, f"{budget} gradients")
                images = self._images(stage)
                rates: list[Rate | None] = []
                for place, judged in enumerate(record.targets):
                    known = old[budget].success if budget in old else ()
                    if place < len(known):
                        rates.append(known[place])
                        continue
                    rates.append(self._rate(jury, judged, record, images))
                spent = self.ledger.cost(stage)[1] / self.n
                point = replace(point, gradients_per_image=spent, success=rates)
            points.append(point)
        return self._keep(replace(record, budgets=points))

    def _rate(self, jury: Jury, judged: Judgement, record: Craft, images: np.ndarray) -> Rate | None:
        """Return the success of other images on a target judged before; None if it is no longer to be had."""
        net = next((one for one in self.targets if one.fingerprint == judged.fingerprint), None)
        if net is None:
            try:
                (net,) = gather([judged.model], self.samples, self.plan.device, what="target")
            except UsageError:
                return None
            if net.fingerprint != judged.fingerprint:
                return None
        said = {"clean": judged.predictions["clean"], "adversarial": jury.predictions(net, images)}
        return Judgement.of(net.identity, record.labels, record.goals, said).rate

    def _spend(self, attack: Any, goals: Sequence[int] | None) -> int:
        """Return the gradients that the first image costs."""
        with self.ensemble.at_rest(), own_randomness(self.plan.seed, "prices"):
            return self._chunk(0, attack, self._surrogates(), goals, np.array([0])).backwards

    def _png(self, record: Craft, place: Path) -> Craft:
        adversarial = record.adversarial or folder.read_adversarial(self.out or place)
        clean = self.samples.images(np.arange(self.n)).numpy()
        images, largest = lattice.save(place, adversarial["x"], clean, record.labels, self.threat)
        jury = self._jury(record.goals)
        rates = [self._rate(jury, judged, record, images) for judged in record.targets]
        return replace(record, png=Saved(str(place), largest, rates))

    # --- the record

    def _images(self, stage: int) -> np.ndarray:
        shape = tuple(self.samples.images([0]).shape[1:])
        blob = b"".join(image for _, _, image in self.ledger.crafted(stage))
        return np.frombuffer(blob, np.float32).reshape(self.n, *shape)

    def _keep(self, record: Craft) -> Craft:
        """Write transfer.json as it is now: its presence means that the images are done, not all judgements."""
        if self.out is None:
            return record
        seals = {name: folder.sha256(self.out / name) for name in folder.CRAFT_SEALED}
        record = replace(record, files=seals)
        folder.write_record(self.out, record)
        return record
