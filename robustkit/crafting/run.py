"""One craft run: craft images, evaluate targets on them, forecast, compute the budget curve, write the record."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from robustkit.core.determinism import deterministic_operations
from robustkit.core.devices import ComputeDevice
from robustkit.core.errors import RunError, UsageError
from robustkit.core.float32 import float32_operations
from robustkit.core.schema import MAX_INTEGER
from robustkit.crafting import png_export
from robustkit.crafting.image_store import IMAGES, WITHOUT, ResumableCrafter
from robustkit.crafting.judging import ImageArray, TargetEvaluator, clean_flags
from robustkit.crafting.scheduler import DistributedCrafter
from robustkit.crafting.spec import CraftRequest
from robustkit.data.prefetch import read_ahead
from robustkit.distributed.sharing import SharedPool
from robustkit.engine import gradient_budgets
from robustkit.engine.model.loaded_models import Net, gather, same_classes
from robustkit.engine.progress import Progress
from robustkit.runs import run_folder
from robustkit.runs.craft_record import Craft, Forecast, Judgement, Point, Saved
from robustkit.runs.environment import environment
from robustkit.runs.examples import arrays, evenly_spaced
from robustkit.runs.ledger import Ledger
from robustkit.runs.opening import finished_before, open_for_writing, require_writable
from robustkit.runs.report_parts import Rate
from robustkit.runs.unfinished_work import Store
from robustkit.runs.versions import record_part

# Images written as PNG files at once.
PNG_BATCH_SIZE = 256


def run_craft(
    plan: CraftRequest,
    out: Path | None = None,
    targets: Sequence[Net] = (),
    *,
    forecast: bool = False,
    curve: Sequence[int] = (),
    png: Path | None = None,
    progress: Progress | None = None,
    pool: SharedPool | None = None,
    overwrite: bool = False,
) -> Craft:
    """Craft, or resume, or read the images of a finished run; then evaluate the targets on them.

    Args:
        plan: what to craft.
        out: the run folder; None writes nothing.
        targets: models to evaluate on the images, besides those evaluated by earlier calls.
        forecast: leave each surrogate out in turn, craft on the others, and evaluate it.
        curve: gradients per image to craft with as well.
        png: a folder for the images as 8-bit files.
        progress: receives events.
        pool: a pool of workers shared with other runs; None for a pool of this run's own.
        overwrite: delete the run in `out` first.

    Raises:
        UsageError: if models, targets or folder do not fit the request.
        RunError: if it fails on the way; the same call resumes.
    """
    same_classes(plan.nets, targets)
    if forecast and len(plan.nets) < 2:
        raise UsageError("a forecast leaves one surrogate out in turn; give at least two with --surrogate.")
    if curve:
        gradient_budgets.check(plan.composed)
    progress = progress or Progress()
    opened = open_for_writing(out, plan.spec, overwrite=overwrite, say=progress.say) if out else None
    kernels = deterministic_operations(plan.deterministic, plan.device)
    with opened or nullcontext(True) as writable, kernels, float32_operations("ieee"):
        try:
            return _CraftRun(plan, out, targets, progress, pool, writable).run(forecast, list(curve), png)
        finally:
            progress.close()
            ComputeDevice(plan.device).empty_cache()


class _CraftRun:
    """One call of `run_craft`."""

    def __init__(
        self,
        plan: CraftRequest,
        out: Path | None,
        targets: Sequence[Net],
        progress: Progress,
        pool: SharedPool | None,
        writable: bool,
    ) -> None:
        self.writable, self.parts = writable, list[dict[str, Any]]()
        self.pool = pool
        self.plan, self.out, self.targets, self.progress = plan, out, targets, progress
        self.samples, self.n = plan.samples, len(plan.samples)
        self.store = Store(out / run_folder.UNFINISHED if out and writable else None, plan.spec.run_id)

    def run(self, forecast: bool, curve: list[int], png: Path | None) -> Craft:
        record = self._stored()
        if record is None or self._work_left(record, forecast, curve):
            require_writable(self.out, self.writable, "the result")
            with (
                Ledger.open(self.out and self.out / run_folder.LEDGER, self.plan.spec.run_id) as ledger,
                closing(self._make_crafter(ledger)) as self.crafter,
            ):
                ledger.require(self.n, self.samples.images([0]).nbytes, MAX_INTEGER)
                ledger.check_chunks()
                self.parts = record_part(ledger)
                if record is None:
                    record = self._main()
                record = self._judge(record)
                if forecast and record.forecast is None:
                    record = self._forecast(record)
                known = [point.budget for point in record.budgets or ()]
                if wanted := sorted({*known, *curve}):
                    record = self._curve(record, wanted)
                ledger.seal()
                self.store.clear()
        else:
            self.progress.say(finished_before(record.run_id))
        if png is not None:
            record = self._png(record, png)
            record = self._keep(record) if self.writable else record
        return record

    def _make_crafter(self, ledger: Ledger) -> ResumableCrafter:
        if self.pool is None and self.plan.ray is None and self.plan.workers in (None, 1):
            return ResumableCrafter(self.plan, ledger, self.progress, self.store)
        return DistributedCrafter(self.plan, ledger, self.progress, self.store, self.pool)

    def _stored(self) -> Craft | None:
        if self.out is None or not run_folder.is_craft(self.out):
            return None
        record = run_folder.read_craft(self.out)
        if broken := run_folder.broken_seals(self.out, record):
            raise RunError(f"{broken[0]} Give another --out folder to craft again.")
        return replace(record, adversarial=run_folder.read_adversarial(self.out))

    def _work_left(self, record: Craft, forecast: bool, curve: list[int]) -> bool:
        points = record.budgets or ()
        unknown = set(curve) - {point.budget for point in points}
        # `robustkit transfer` may have added targets later.
        short = any(point.steps and len(point.success) < len(record.targets) for point in points)
        return bool(
            (forecast and not record.forecast) or unknown or (curve and short) or self._targets_missing(record)
        )

    def _targets_missing(self, record: Craft | None) -> list[Net]:
        known = {one.fingerprint for one in record.targets} if record else set()
        return [net for net in self.targets if net.fingerprint not in known]

    def _main(self) -> Craft:
        plan = self.plan
        crafter, ledger = self.crafter, self.crafter.ledger
        done = len(ledger.predictions(IMAGES))
        if done:
            self.progress.say(f"resuming {plan.spec.run_id}: {done} of {self.n} images done")
        goals = crafter.goals()
        crafter.craft_missing(IMAGES, plan.composed, None, goals, plan.spec.attack_name)
        forwards, backwards, seconds = ledger.cost(IMAGES)
        each, most = backwards / self.n / len(plan.nets), max(net.count for net in plan.nets)
        if most > 1 and each < most:
            self.progress.say(
                f"{each:.0f} gradients of each surrogate did not reach all {most} nets of a run folder; give the "
                "attack more steps, or +light(samples=K)"
            )
        shape = tuple(self.samples.images([0]).shape[1:])
        rows = run_folder.Adversarials(
            np.arange(self.n, dtype=np.int64),
            self.samples.labels.astype(np.int64),
            shape,
            lambda: (image for _, _, image in ledger.crafted(IMAGES)),
        )
        if self.out is not None:
            run_folder.write_adversarial(self.out, rows)
            prediction = np.array([label for _, label in ledger.predictions(IMAGES)], np.int64)
            shown = arrays(rows, prediction, ([], evenly_spaced(self.n)), self.samples, plan.threat)
            run_folder.write_examples(self.out, shown)
        surroundings = environment(plan.device, "fp32", crafter.batch) | {
            "loaded": crafter.ensemble.storage.loaded,
            "held": crafter.ensemble.storage.held,
            "classes": plan.nets[0].classes,
            "class_names": plan.nets[0].class_names,
            "training_flops": [net.training for net in plan.nets],
            "ways": crafter.ensemble.configs,
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
            not_finite=sum(prediction == -1 for _, prediction in ledger.predictions(IMAGES)),
            surrogates=[],
            targets=[],
            environment=surroundings,
            flags=[short]
            if (short := gradient_budgets.falls_short(plan.composed, float(plan.threat.eps)))
            else (),
            adversarial=rows.arrays() if self.out is None else run_folder.read_adversarial(self.out),
        )

    # --- evaluation of targets

    def _evaluator(self, goals: Sequence[int] | None) -> TargetEvaluator:
        return TargetEvaluator(
            self.samples, self.plan.threat, goals, self.plan.seed, self.plan.device, store=self.store
        )

    def _judge(self, record: Craft) -> Craft:
        evaluator = self._evaluator(record.goals)
        images = self.crafter.images(IMAGES)
        if not record.surrogates:
            own: list[Judgement] = []
            self.progress.stage("surrogates", self.n * len(self.plan.nets), self.n, self.n)
            for number, net in enumerate(self.plan.nets):
                own.append(evaluator.judge(net, images, controls=False))
                self.progress.advance(self.n * (number + 1), self.n)
            record = self._keep(replace(record, surrogates=own))
        missing = self._targets_missing(record)
        self.progress.stage("targets", self.n * max(len(missing), 1), self.n, self.n)
        for number, net in enumerate(missing):
            record = self._keep(record.judged([evaluator.judge(net, images, controls=True)]))
            self.progress.advance(self.n * (number + 1), self.n)
        return record

    def _forecast(self, record: Craft) -> Craft:
        evaluator = self._evaluator(record.goals)
        members = range(len(self.plan.nets))
        fooled, backwards = [], 0
        for left in members:
            stage = WITHOUT + left
            others = [number for number in members if number != left]
            self.crafter.craft_missing(
                stage, self.plan.composed, others, record.goals, f"without {left + 1} of {len(members)}"
            )
            backwards += self.crafter.ledger.cost(stage)[1]
            judged = evaluator.judge(self.plan.nets[left], self.crafter.images(stage), controls=False)
            fooled.append(judged.fooled(record.labels, record.goals))
        return self._keep(replace(record, forecast=Forecast.of(fooled, backwards / self.n)))

    def _curve(self, record: Craft, wanted: list[int]) -> Craft:
        if not record.targets:
            raise UsageError("--budgets needs a model to judge the images on; give one with --target.")
        old = {point.budget: point for point in record.budgets or ()}
        same = all(len(point.success) in (0, len(record.targets)) for point in old.values())
        if same and set(wanted) <= old.keys():
            return record
        prices = gradient_budgets.Prices.of(
            self.plan.composed, lambda attack: self.crafter.gradients_per_image_of(attack, record.goals)
        )
        evaluator = self._evaluator(record.goals)
        points: list[Point] = []
        for budget in wanted:
            point, attack = prices.point(self.plan.composed, budget, float(self.plan.threat.eps))
            if attack is not None:
                stage = gradient_budgets.STAGE + budget
                self.crafter.craft_missing(stage, attack, None, record.goals, f"{budget} gradients")
                images = self.crafter.images(stage)
                rates: list[Rate | None] = []
                for number, judged in enumerate(record.targets):
                    known = old[budget].success if budget in old else ()
                    if number < len(known):
                        rates.append(known[number])
                        continue
                    rates.append(self._rate(evaluator, judged, record, images))
                spent = self.crafter.ledger.cost(stage)[1] / self.n
                point = replace(point, gradients_per_image=spent, success=rates)
            points.append(point)
        return self._keep(replace(record, budgets=points))

    def _rate(
        self, evaluator: TargetEvaluator, judged: Judgement, record: Craft, images: ImageArray
    ) -> Rate | None:
        """Return the success of other images on a target evaluated before; None if it cannot be loaded again."""
        net = next((one for one in self.targets if one.fingerprint == judged.fingerprint), None)
        if net is None:
            try:
                (net,) = gather([judged.model], self.samples, self.plan.device, what="target")
            except UsageError:
                return None
            if net.fingerprint != judged.fingerprint:
                return None
        prediction = {"clean": judged.predictions["clean"], "adversarial": evaluator.predictions(net, images)}
        return Judgement.of(net.identity, record.labels, record.goals, prediction).rate

    def _png(self, record: Craft, folder: Path) -> Craft:
        found = (record.adversarial or run_folder.read_adversarial(self.out or folder))["x"]
        every = np.arange(self.n)
        blocks = read_ahead(self.samples, np.split(every, every[PNG_BATCH_SIZE::PNG_BATCH_SIZE]))
        pairs = ((found[positions], x.numpy()) for positions, x in blocks)
        images, largest = png_export.save(folder, pairs, record.labels, self.plan.threat)
        evaluator = self._evaluator(record.goals)
        rates = [self._rate(evaluator, judged, record, images) for judged in record.targets]
        return replace(record, png=Saved(str(folder), largest, rates))

    # --- the record

    def _keep(self, record: Craft) -> Craft:
        """Write transfer.json as it is now; its presence means that the images are done, not all evaluations."""
        classes = self.plan.nets[0].classes
        label_flags = clean_flags([*record.surrogates, *record.targets], record.labels, classes)
        # A surrogate may be a target, too.
        record = replace(record, flags=list(dict.fromkeys([*record.flags, *self.samples.flags, *label_flags])))
        if self.out is None:
            return record
        if self.parts:
            record = replace(record, environment={**record.environment, "parts": self.parts})
        seals = {name: run_folder.sha256(self.out / name) for name in run_folder.CRAFT_SEALED}
        record = replace(record, files=seals)
        run_folder.write_record(self.out, record)
        return record
